"""`adaptive-serve` with the mock engine in the place of the engine's process."""

import os
from typing import Any

from server.cli import find_plugins, make_parser, prepare_args, prepare_environment


def serve(arguments: list[str], ttft: float, itl: float, jitter: float, is_stock: bool) -> None:
    """Serve until a signal.

    Args:
        arguments: those of `adaptive-serve`.
        ttft, itl, jitter: as in `Timing`.
        is_stock: leave our plugin out, for a comparison with vLLM's own front end.

    Raises:
        ValueError: an argument is wrong.
    """
    if is_stock:
        os.environ["VLLM_PLUGINS"] = ",".join(find_plugins())
    else:
        prepare_environment()
    # The temperatures of an engine without a model fit no head's feature probe.
    args = prepare_args(*make_parser().parse_known_args([*arguments, "--no-verify-base"]))
    if max(args.api_server_count or 1, args.data_parallel_size) > 1:
        raise ValueError("the mock engine lives in one API process: no several servers or engines")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.v1.engine.core_client import EngineCoreClient

    from loadtests.mock_engine import MockCore, Timing

    def make_client(vllm_config: Any, *_: Any, renderer: Any, **__: Any) -> MockCore:
        return MockCore(vllm_config, renderer, Timing(ttft, itl, jitter))

    # The one place where vLLM starts its engine's process.
    EngineCoreClient.make_async_mp_client = staticmethod(make_client)
    ServeSubcommand.cmd(args)
