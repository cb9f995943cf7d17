"""`python -m loadtests`."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from loadtests.scenario import ScenarioError, list_scenarios, load_scenario
from loadtests.settings import DEFAULT_SCENARIO, DURATION, SCALE, SCENARIO, read_scenario

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
URL = "http://127.0.0.1:8000"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Load tests of a running adaptive-head-server.",
)

Url = Annotated[str, typer.Option(help="The server's address, without /v1.")]
Name = Annotated[str, typer.Option("--scenario", help="A scenario's name, or a YAML file.")]
Scale = Annotated[float, typer.Option(min=0.001, help="Times the scenario's users.")]


@app.command()
def run(
    url: Url = URL,
    scenario: Name = DEFAULT_SCENARIO,
    scale: Scale = 1.0,
    duration: Annotated[
        float | None, typer.Option(min=1, help="Seconds in all, instead of the scenario's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for locust's CSV files and its HTML report.")
    ] = None,
    web: Annotated[bool, typer.Option(help="Serve locust's web page, to start it there.")] = False,
    web_port: Annotated[int, typer.Option(help="Of that page.")] = 8089,
) -> None:
    """Run a scenario. Exits with 1 if anything is not as it must be."""
    environment = {SCENARIO: scenario, SCALE: str(scale), DURATION: str(duration or "")}
    try:
        read_scenario(environment)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except (ScenarioError, OSError) as error:
        refuse(error)
    page = ["--web-host", "127.0.0.1", "--web-port", str(web_port)]
    options = page if web else ["--headless", "--only-summary"]
    if out is not None:
        options += ["--csv", str(out / "locust"), "--html", str(out / "locust.html")]
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, *options]
    # In place of this process, so that signals and the exit code are locust's.
    os.execve(sys.executable, command, os.environ | environment)


@app.command()
def compare(
    url: Url = URL,
    fixed_url: Annotated[
        str | None, typer.Option(help="Another server for the fixed requests, such as stock vLLM.")
    ] = None,
    scenario: Name = DEFAULT_SCENARIO,
    scale: Scale = 1.0,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of blocks.")] = 10,
    requests: Annotated[int, typer.Option(min=1, help="Of each user in a block.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("runs/comparison"),
) -> None:
    """Measure adaptive against fixed in turns; write HTML, Markdown and plots."""
    from loadtests.compare import CompareError, make_plan
    from loadtests.compare import compare as measure_and_report

    try:
        plan = make_plan(
            load_scenario(scenario).adjust(scale), url, fixed_url or url, pairs, requests
        )
        measurements, rows = measure_and_report(plan, out)
    except (ScenarioError, OSError) as error:
        refuse(error)
    except CompareError:
        raise typer.Exit(2) from None
    except ValueError as error:
        typer.echo(f"loadtests: {error}", err=True)
        raise typer.Exit(1) from None
    for row in rows:
        ratio = row.ratio
        typer.echo(
            f"{row.name.partition(',')[0]:<36}{ratio.mean:.3f}  [{ratio.low:.3f}, {ratio.high:.3f}]"
            f"  {row.verdict}"
        )
    typer.echo(f"adaptive ÷ fixed, {len(measurements.list_pairs())} pairs: {out / 'report.html'}")
    if measurements.is_broken:
        raise typer.Exit(1)


@app.command()
def scenarios() -> None:
    """List the scenarios that ship."""
    for name in list_scenarios():
        scenario = load_scenario(name)
        typer.echo(f"{name:<12}{scenario.duration:>7g} s  {scenario.about}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Any other option is adaptive-serve's: the model, --head, --served-model-name...",
)
def mock_server(
    context: typer.Context,
    ttft: Annotated[float, typer.Option(min=0, help="Seconds to the first token.")] = 0.05,
    itl: Annotated[float, typer.Option(min=0, help="Seconds between two tokens.")] = 0.01,
    jitter: Annotated[
        float, typer.Option(min=0, max=1, help="Share by which these vary, either way.")
    ] = 0.0,
    stock: Annotated[
        bool, typer.Option(help="vLLM's own front end, without adaptive temperatures.")
    ] = False,
) -> None:
    """Serve without a model: the real front end, over an engine that sends tokens at set times."""
    from loadtests.mock_server import serve

    try:
        serve(context.args, ttft, itl, jitter, stock)
    except (ValueError, OSError) as error:
        refuse(error)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def vllm_bench(context: typer.Context) -> None:
    """`vllm bench serve`, with its options, also where the CPU wheel's `vllm` does not start."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args(context.args))


def refuse(error: object) -> NoReturn:
    """Say one sentence, and exit with 2."""
    typer.echo(f"loadtests: {error}", err=True)
    raise typer.Exit(2)
