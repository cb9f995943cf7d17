"""`adaptive-serve`: vLLM's server, with the options that it takes to choose temperatures."""

import argparse
import math
import os
import sys
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

from adaptive_head.checkpoint import load_head
from adaptive_head.dtype import choose_dtype
from adaptive_head.embedded_model import EMBEDDED_NAME, prepare
from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.heads import SHIPPED_HEADS
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from adaptive_head.vllm.compat import UnsupportedError, check_version, refuse_unsupported
from adaptive_head.vllm.limits import DEFAULT_MAX_QUEUED, Limits, option_name
from adaptive_head.vllm.settings import (
    ADMIN_KEY_VARIABLE,
    CONFIG_KEY,
    CPU_KV_CACHE_BYTES,
    AdaptiveSettings,
    read_admin_key,
)
from server.lifetime import PLUGIN, end_with_parent
from server.operator_flags import parse_max, parse_policy

# Processes that `adaptive-serve` spawns import this module first. vLLM calls the function as well,
# but an engine core only after it has waited for its API process, for minutes if that is gone.
end_with_parent()

# All of vLLM's groups but the one for endpoints, which only load when they are named.
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)

# vLLM's own default, 0, cuts off every answer that a restart finds running.
SHUTDOWN_TIMEOUT_S = 30
# Where no key keeps strangers out; vLLM would listen on all addresses.
LOCAL_HOST = "127.0.0.1"

DESCRIPTION = """\
An OpenAI-compatible server that chooses its own temperature: send
"temperature": "adaptive" where you sent a number.

MODEL is a folder or a Hugging Face name, as for `vllm serve`; without it,
SmolLM2-135M-Instruct is prepared once and served with the head that ships.
"""
EPILOG = """\
Every option of `vllm serve` is accepted too: `adaptive-serve --help=all` lists them,
`--help=KEYWORD` those of a section or about a word. On a CPU, unless given otherwise,
the model runs in eager mode, with 2 GiB of KV cache, and in the dtype of its weights
if the processor has instructions for bfloat16 (AVX-512 BF16, AMX, Arm's BF16), else in
float32. Without --host and without an API key (VLLM_API_KEY) it listens on 127.0.0.1 only.

examples:
  adaptive-serve
  adaptive-serve Qwen/Qwen3-8B --head heads/qwen3-8b --port 8001
  adaptive-serve MODEL --head fast=heads/a --head careful=heads/b --default-head careful
  adaptive-serve MODEL --adaptive-policy entropy          "adaptive" without a head
"""


def make_parser() -> argparse.ArgumentParser:
    """The options that are ours; everything else is left to vLLM."""
    parser = argparse.ArgumentParser(
        "adaptive-serve",
        usage="adaptive-serve [MODEL] [--head [NAME=]DIR ...] [any option of vllm serve]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a head to load; may be given again. Its name is the folder's unless NAME is given",
    )
    parser.add_argument(
        "--default-head",
        metavar="NAME",
        help="for requests that name no head (default: the first trained one that has not failed "
        "the gate)",
    )
    parser.add_argument(
        "--adaptive-default",
        action="store_true",
        help="requests that name no temperature are adaptive",
    )
    parser.add_argument(
        "--adaptive-policy",
        metavar="POLICY",
        help="for adaptive requests that choose neither a policy nor a head: a policy's name, or a "
        "JSON object like the adaptive of a request (default: the default head)",
    )
    parser.add_argument(
        "--adaptive-max",
        metavar="T",
        help="no adaptive temperature above this, whatever a request asks for",
    )
    parser.add_argument(
        "--no-verify-base",
        action="store_true",
        help="take heads of the right width without comparing the model's weights with those that "
        "the head was made for, and only warn where its feature probe does not fit; for quantised "
        "copies of that model",
    )
    parser.add_argument(
        "--request-log",
        metavar="FILE",
        help="append a line of JSON for every request, without its texts; - is the standard output",
    )
    parser.add_argument(
        "--no-playground",
        action="store_true",
        help="leave out the page at /playground, which needs no key itself",
    )
    parser.add_argument(
        "--metrics-without-key",
        action="store_true",
        help="on a server with an API key, let everyone read /metrics",
    )
    parser.add_argument(
        "--heads-dir",
        metavar="DIR",
        type=Path,
        help="let POST /v1/adaptive/heads load heads from below this folder while the server runs; "
        f"its callers show the key in the environment variable {ADMIN_KEY_VARIABLE}",
    )
    group = parser.add_argument_group("limits of one request")
    for name, field in Limits.model_fields.items():
        group.add_argument(
            option_name(name),
            dest=name,
            type=type(field.default),
            default=field.default,
            metavar="N",
            help=f"{field.description} (default: {field.default})",
        )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, check what can be checked without an engine, and serve.

    Exits with 2 and one sentence where an option is wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return
    ours, vllm_argv = parser.parse_known_args(argv)
    prepare_environment()
    from safetensors import SafetensorError
    from vllm.exceptions import VLLMError

    try:
        args = prepare_args(ours, vllm_argv)
    except (ValueError, TypeError, OSError, RuntimeError, SafetensorError, VLLMError) as error:
        parser.exit(2, f"adaptive-serve: {error}\n")
    # vLLM only logs that a plugin cannot be imported, and would then serve without it.
    from vllm.entrypoints.cli.serve import ServeSubcommand

    import server.plugin  # noqa: F401
    from server.shutdown import DRAIN
    from server.signals import catch_signals

    with catch_signals():
        ServeSubcommand.cmd(args)
    if DRAIN.has_engine_died:
        # vLLM would end with 0, which an orchestrator takes for intended.
        parser.exit(1, "adaptive-serve: the engine died\n")


def prepare_args(ours: Namespace, vllm_argv: list[str]) -> Namespace:
    """vLLM's arguments, with the worker, the scheduler and the heads put in.

    Raises:
        HeadError: a head cannot be used with this model.
        ValueError: options contradict each other.
    """
    heads = name_heads(ours.head)
    args = parse_vllm(vllm_argv)
    if args.model_tag is None:
        args.model_tag = str(prepare())
        args.served_model_name = args.served_model_name or [EMBEDDED_NAME]
        heads = heads or dict(SHIPPED_HEADS)
    settings = AdaptiveSettings(
        heads=heads,
        default_head=ours.default_head,
        adaptive_by_default=ours.adaptive_default,
        verify_base=not ours.no_verify_base,
        request_log=ours.request_log,
        playground=not ours.no_playground,
        metrics_without_key=ours.metrics_without_key,
        heads_dir=ours.heads_dir and ours.heads_dir.expanduser().resolve(),
        adaptive_policy=parse_policy(ours.adaptive_policy),
        adaptive_max=parse_max(ours.adaptive_max),
        limits=read_limits(ours),
    )
    settings.check()
    has_api = not args.headless
    num_api_processes = args.api_server_count or 1
    if has_api and read_admin_key(settings.heads_dir, num_api_processes, args.enable_elastic_ep):
        # vLLM's default is one API process a data-parallel replica.
        args.api_server_count = 1
    check_heads(settings, Path(args.model_tag))
    refuse_options(args)
    if settings.request_log is not None:
        from server.request_log import check_target

        check_target(settings.request_log)
    configure(args, settings)
    return args


def read_limits(ours: Namespace) -> Limits:
    """The limits on the command line.

    Raises:
        ValueError: one of them is not positive.
    """
    values = {name: getattr(ours, name) for name in Limits.model_fields}
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{option_name(name)} {value}: must be a positive number")
    return Limits(**values)


def prepare_environment() -> None:
    """Enable the plugin in this process and those it starts. Before vLLM is imported."""
    listed = os.environ.get("VLLM_PLUGINS")
    plugins = find_plugins() if listed is None else [name for name in listed.split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, PLUGIN]))


def find_plugins() -> list[str]:
    """The other installed plugins that vLLM would load by itself.

    Naming ours makes vLLM's list exclusive, and must not switch the others off.
    """
    names = {plugin.name for group in PLUGIN_GROUPS for plugin in entry_points(group=group)}
    return sorted(names - {PLUGIN})


def parse_vllm(vllm_argv: list[str]) -> Namespace:
    """Parse the options of `vllm serve`; on a CPU, with defaults that fit one."""
    from vllm import __version_tuple__

    # The names below may have moved in a minor that is not supported.
    check_version(__version_tuple__)
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from adaptive_head.vllm.moved import cli_env_setup, make_arg_parser, validate_parsed_serve_args
    from server.keys import read_api_keys

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="adaptive-serve"))
    parser.set_defaults(shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    if current_platform.is_cpu():
        # Compiling takes minutes on a few cores.
        parser.set_defaults(enforce_eager=True, dtype=choose_dtype(is_on_cpu=True))
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            parser.set_defaults(kv_cache_memory_bytes=CPU_KV_CACHE_BYTES)
    # vLLM's own default must not pass for a model that the user asked for.
    parser.set_defaults(model=None)
    args = parser.parse_args(vllm_argv)
    args.model_tag = args.model_tag or args.model
    if args.max_num_queued_reqs is None:
        args.max_num_queued_reqs = DEFAULT_MAX_QUEUED * max(1, args.data_parallel_size)
    if args.host is None and not read_api_keys(args):
        args.host = LOCAL_HOST
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    return args


def name_heads(specifications: list[str]) -> dict[str, Path]:
    """Heads by name, from `[NAME=]DIR`.

    Raises:
        ValueError: two heads have the same name.
    """
    heads: dict[str, Path] = {}
    for specification in specifications:
        name, equals, folder = specification.partition("=")
        is_named = bool(equals) and "/" not in name
        path = Path(folder if is_named else specification).expanduser().resolve()
        name = name if is_named else path.name
        if not name or name in heads:
            raise ValueError(f"--head {specification}: name it apart, with NAME=DIR")
        heads[name] = path
    return heads


def check_heads(settings: AdaptiveSettings, model: Path) -> None:
    """Find a wrong head now rather than after the engine's start.

    The engine checks again; what only it can know (a model from the hub) is left to it.
    """
    is_verified = settings.verify_base and settings.heads and model.is_dir()
    fingerprint = fingerprint_model(model) if is_verified else None
    for folder in settings.heads.values():
        load_head(folder, fingerprint=fingerprint)


def is_v2_likely() -> bool:
    """Whether vLLM will use its V2 model runner, as far as that can be told before it starts."""
    import vllm.envs as envs
    from vllm.platforms import current_platform

    asked_for = envs.VLLM_USE_V2_MODEL_RUNNER
    return not current_platform.is_cpu() if asked_for is None else asked_for


def refuse_options(args: Namespace) -> None:
    """Refuse now what the engine would refuse after its start.

    Raises:
        UnsupportedError: names the option.
    """
    speculation = args.speculative_config
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            return_sampling_mask=args.return_sampling_mask, runner_type=args.runner
        ),
        parallel_config=args,
        speculative_config=speculation
        and SimpleNamespace(
            enable_adaptive_verification=speculation.get("enable_adaptive_verification", False),
            rejection_sample_method=speculation.get("rejection_sample_method"),
        ),
        use_v2_model_runner=is_v2_likely(),
        watermark_config=args.watermark_config,
    )
    refuse_unsupported(config)
    if args.grpc:
        raise UnsupportedError("--grpc bypasses the adaptive front end: leave it out")


def configure(args: Namespace, settings: AdaptiveSettings) -> None:
    """Put our worker, our scheduler and the settings among vLLM's arguments.

    Raises:
        ValueError: the user has given one of them another value.
    """
    if args.worker_cls not in ("auto", WORKER_CLS):
        raise ValueError(f"--worker-cls {args.worker_cls}: adaptive-serve brings its own worker")
    if args.scheduler_cls not in (None, SCHEDULER_CLS):
        raise ValueError(f"--scheduler-cls {args.scheduler_cls}: adaptive-serve brings its own")
    additional = args.additional_config or {}
    if not isinstance(additional, dict):
        raise ValueError("--additional-config must be a JSON object")
    if CONFIG_KEY in additional:
        raise ValueError(
            f"--additional-config must not contain {CONFIG_KEY}: use --head, --default-head, …"
        )
    args.worker_cls = WORKER_CLS
    args.scheduler_cls = SCHEDULER_CLS
    args.additional_config = additional | {CONFIG_KEY: settings.model_dump(mode="json")}


if __name__ == "__main__":
    main()
