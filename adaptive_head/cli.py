"""The command `adaptive-head`: make, train, look at and try a head."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.markdown import Markdown
from safetensors import SafetensorError

from adaptive_head.checkpoint import (
    BaseModelIdentity,
    HeadError,
    change_head,
    load_head,
    read_metadata,
    save_head,
    upgrade_head,
    write_metadata,
)
from adaptive_head.embedded_model import ModelPreparationError, prepare
from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.head_table import describe_abstention, make_table
from adaptive_head.heads import SHIPPED_HEADS
from adaptive_head.language_model import (
    EMBEDDED,
    find_hidden_size,
    find_language_model,
    find_model_name,
    read_model_config,
)
from adaptive_head.metadata import FORMAT_VERSION

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Make and inspect the heads that choose temperatures.",
)

Number = TypeVar("Number", int, float)

WRONG_INPUT = 2
INTERRUPTED = 130


class LevelOption(StrEnum):
    token = "token"
    sequence = "sequence"


def main() -> None:
    app()


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="Folder to write the head to; new or empty.")],
    model: Annotated[Path, typer.Option(help="Hugging Face folder of the model it is for.")],
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Width of the last hidden state; else config.json's.")
    ] = None,
    temperatures: Annotated[
        str, typer.Option(help="What it chooses from, increasing, with commas.")
    ] = "0,0.2,0.4,0.6,0.8,1.0",
    level: Annotated[
        LevelOption, typer.Option(help="One choice a token, or one a sequence.")
    ] = LevelOption.token,
    layers: Annotated[
        str, typer.Option(help="Widths of the hidden layers, with commas.")
    ] = "2048,2048",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the weights.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; else config.json's, or the folder's.")
    ] = None,
) -> None:
    """Write an untrained head, which chooses all its temperatures about equally often."""
    with explain_errors():
        model_config = read_model_config(model)
        config = HeadConfig(
            hidden_size or find_hidden_size(model, model_config),
            tuple(parse_numbers("--temperatures", temperatures, float)),
            tuple(parse_numbers("--layers", layers, int)),
        )
        identity = BaseModelIdentity(
            name=name or find_model_name(model, model_config),
            fingerprint=fingerprint_model(model),
        )
        network = AdaptiveHead(config, seed)
        save_head(out, network, level=level.value, base_model=identity, trained=False)
    typer.echo(f"Wrote an untrained head for {identity.name} to {out}")
    if identity.fingerprint is None:
        typer.echo(
            f"{model} holds no safetensors, so no server can check that it serves this model",
            err=True,
        )


@app.command()
def show(
    head: Annotated[Path, typer.Argument(help="Folder of the head.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a head, and print what is known of it."""
    with explain_errors():
        loaded = load_head(head)
    if as_json:
        typer.echo(loaded.metadata.model_dump_json(indent=2))
    else:
        Console().print(make_table(loaded))


@app.command()
def upgrade(
    head: Annotated[Path, typer.Argument(help="Folder of the head.")],
    output: Annotated[
        Path | None, typer.Option(help="Write the head to this folder instead; new or empty.")
    ] = None,
) -> None:
    """Rewrite a head's head.json in the newest format; its weights stay as they are."""
    with explain_errors():
        found = upgrade_head(head, output)
    if output is not None:
        typer.echo(f"Wrote {head} in format {FORMAT_VERSION} to {output}")
    elif found == FORMAT_VERSION:
        typer.echo(f"{head} has format {FORMAT_VERSION} already")
    else:
        typer.echo(f"{head} had format {found}, and has format {FORMAT_VERSION} now")


class SelectOption(StrEnum):
    argmax = "argmax"
    sample = "sample"
    mean = "mean"


class StatisticOption(StrEnum):
    probability = "probability"
    margin = "margin"


@app.command(name="set")
def set_defaults(
    head: Annotated[Path, typer.Argument(help="Folder of the head.")],
    select: Annotated[
        SelectOption | None, typer.Option(help="How it chooses for requests that do not say it.")
    ] = None,
    abstain_below: Annotated[
        float | None,
        typer.Option(help="Give the fallback where the statistic is below this, 0 to 1."),
    ] = None,
    fallback: Annotated[
        float | None, typer.Option(help="Temperature where it abstains, 0 to 10.")
    ] = None,
    statistic: Annotated[
        StatisticOption | None,
        typer.Option(
            help="Largest probability, or how far the second largest is below it.",
            show_default="probability",
        ),
    ] = None,
    no_abstain: Annotated[bool, typer.Option("--no-abstain", help="Always choose.")] = False,
) -> None:
    """Change what a head does by default: how it selects, and when it abstains."""
    with explain_errors():
        given = {"threshold": abstain_below, "fallback": fallback, "statistic": statistic}
        abstain = {field: value for field, value in given.items() if value is not None}
        if no_abstain and abstain:
            raise ValueError("--no-abstain does not go with how to abstain")
        if not (select or no_abstain or abstain):
            raise ValueError("say what to change: --select, --abstain-below, --no-abstain, ...")
        changes: dict[str, object] = {"select": select} if select else {}
        if abstain and read_metadata(head).abstain is None:
            abstain.setdefault("statistic", StatisticOption.probability)
        if no_abstain or abstain:
            changes["abstain"] = abstain or None
        metadata = change_head(head, changes)
    abstention = describe_abstention(metadata.abstain)
    typer.echo(f"{head} now has select {metadata.select}, abstain {abstention}")


@app.command()
def probe(
    head: Annotated[Path, typer.Argument(help="Folder of the head.")],
    model: Annotated[
        str, typer.Argument(help="What it was made for: `embedded`, a folder, or one on the hub.")
    ],
) -> None:
    """Add a feature probe to a head, by which a server checks what it reads of the model."""
    with explain_errors(), calm_libraries():
        from adaptive_head.lpo.probing import make_probe, read_probe_states

        identity = find_language_model(model).identity
        loaded = load_head(head, fingerprint=identity.fingerprint)
        made = make_probe(loaded.network, read_probe_states(model))
        write_metadata(head, loaded.metadata.model_copy(update={"probe": made}))
    temperatures = " ".join(f"{value:.2f}" for value in made.temperatures)
    typer.echo(f"{head} now expects the temperatures {temperatures} of {identity.name}")


@app.command(name="model")
def prepare_model() -> None:
    """Download and convert the embedded model, unless it is there, and print its folder."""
    with explain_errors():
        folder = prepare()
    typer.echo(folder)


class StageOption(StrEnum):
    rollouts = "rollouts"
    pairs = "pairs"
    train = "train"
    evaluate = "evaluate"


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="YAML file of the experiment.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results; else runs/NAME.")] = None,
    until: Annotated[
        StageOption, typer.Option(help="The last stage to do.")
    ] = StageOption.evaluate,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few short responses: try it, in minutes.")
    ] = False,
) -> None:
    """Train and evaluate heads as an experiment says, skipping what is there already."""
    with explain_errors(), calm_libraries():
        from adaptive_head.lpo.experiment import read_experiment
        from adaptive_head.lpo.run import Run

        settings = read_experiment(experiment)
        settings = settings.shrink() if quick else settings
        name = f"{settings.name}-quick" if quick else settings.name
        folder = out or Path("runs") / name
        Run(settings, find_language_model(settings.model), folder).execute(until.value)
        results = folder / "evaluation" / "results.md"
        if until is StageOption.evaluate:
            Console().print(Markdown(results.read_text(encoding="utf-8")))
    typer.echo(f"Results are in {folder}", err=True)


@app.command()
def gate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    mark: Annotated[
        list[Path] | None,
        typer.Option(help="Head of the run whose head.json gets the verdict; repeatable."),
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(help="Copy what the verdict rests on, compressed, to this folder."),
    ] = None,
) -> None:
    """Judge by a run's answers whether its heads are fit to be a default."""
    with explain_errors(), calm_libraries():
        from adaptive_head.lpo.gate import judge_run, mark_head, pack_run
        from adaptive_head.lpo.verdicts import make_verdict_table, write_sentence

        if pack is not None:
            pack_run(folder, pack)
        verdicts = judge_run(folder)
        for head in mark or ():
            mark_head(head, folder, verdicts)
    Console().print(make_verdict_table(verdicts))
    for verdict in verdicts:
        typer.echo(write_sentence(verdict))


@app.command()
def inspect(
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    head: Annotated[Path, typer.Option(help="Folder of the head.")] = SHIPPED_HEADS["token"],
    model: Annotated[str, typer.Option(help="`embedded`, a folder, or a name on the hub.")] = (
        EMBEDDED
    ),
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Write the same as an HTML page to this file.")
    ] = None,
) -> None:
    """Answer a prompt, and show each token coloured by its temperature."""
    with explain_errors(), calm_libraries():
        from adaptive_head.lpo.coloring import make_page, print_answer
        from adaptive_head.lpo.inspection import answer_prompt

        maximum = max(read_metadata(head).temperatures)
        pieces, temperatures = answer_prompt(
            prompt, head, find_language_model(model), max_tokens, seed
        )
        print_answer(Console(), pieces, temperatures, prompt, maximum)
        if html is not None:
            page = make_page(pieces, temperatures, "Answer by temperature", prompt, maximum)
            html.write_text(page, encoding="utf-8")


@contextmanager
def calm_libraries() -> Iterator[None]:
    """Keep vLLM's log and its libraries' warnings off the terminal, unless the user set a level.

    Ctrl-C ends with one line: what is on disk goes on from there.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except KeyboardInterrupt:
            typer.echo("Stopped. The same command goes on from here.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name} is not installed: pip install 'adaptive-head-server[train]'"
            ) from None


@contextmanager
def explain_errors() -> Iterator[None]:
    """Turn what a user can cause into one red sentence and exit status 2."""
    try:
        yield
    except (HeadError, ValueError, OSError, SafetensorError, ModelPreparationError) as error:
        sentence = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(
            f"adaptive-head: {sentence}", style="red", markup=False, highlight=False
        )
        raise typer.Exit(WRONG_INPUT) from None


def parse_numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Numbers with commas between them; an empty text is none."""
    try:
        return [kind(part) for part in text.split(",") if text.strip()]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between, got {text!r}") from None


if __name__ == "__main__":
    main()
