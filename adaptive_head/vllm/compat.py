"""Is this a vLLM that the plugin fits, and a configuration that it can serve?

Everything that cannot work is refused here, at start-up, with a sentence that names the option.
"""

import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED_MINORS = {(0, 32), (0, 33)}


class UnsupportedError(RuntimeError):
    """This vLLM, or this configuration of it, cannot serve adaptive temperatures."""


def check_version(version_tuple: tuple[int | str, ...]) -> None:
    """Refuse every vLLM minor that the plugin was not tested with.

    Raises:
        UnsupportedError: names the supported minors and the one found.
    """
    if tuple(version_tuple[:2]) not in SUPPORTED_MINORS:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in sorted(SUPPORTED_MINORS))
        found = ".".join(map(str, version_tuple[:3]))
        raise UnsupportedError(f"this release needs vLLM {wanted}, found vLLM {found}")


def check_parameters(function: Callable[..., object], *names: str) -> None:
    """Refuse a vLLM in which something that the plugin overrides or calls has changed.

    Raises:
        UnsupportedError: `function` does not take exactly the parameters `names`.
    """
    found = tuple(inspect.signature(function).parameters)
    if found != names:
        raise UnsupportedError(
            f"vLLM's {function.__qualname__} takes {found}, this release expects {names}"
        )


def refuse_unsupported(config: "VllmConfig") -> None:
    """Refuse a configuration in which adaptive temperatures would be wrong or missing.

    Raises:
        UnsupportedError: names the option.
    """
    model, parallel = config.model_config, config.parallel_config
    speculation = config.speculative_config
    refusals = {
        "--speculative-config and vLLM's V1 model runner": (
            speculation is not None and not config.use_v2_model_runner
        ),
        "enable_adaptive_verification in --speculative-config": (
            speculation is not None and speculation.enable_adaptive_verification
        ),
        # It accepts drafts that do not follow the temperature's distribution.
        'rejection_sample_method "fly" in --speculative-config': (
            speculation is not None and speculation.rejection_sample_method == "fly"
        ),
        "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
        "--return-sampling-mask": model.return_sampling_mask,
        "--watermark-config": config.watermark_config is not None,
        "--distributed-executor-backend external_launcher": (
            parallel.distributed_executor_backend == "external_launcher"
        ),
        "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0": (
            parallel.distributed_executor_backend == "ray"
            and os.environ.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "1") == "0"
        ),
        "--runner pooling (a pooling model)": model.runner_type == "pooling",
        "a diffusion model": bool(getattr(model, "is_diffusion", False)),
        "VLLM_USE_RUST_FRONTEND": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
    }
    if found := [name for name, is_found in refusals.items() if is_found]:
        raise UnsupportedError(
            f"adaptive temperatures do not work with {', '.join(found)}: "
            "leave the option out, or serve without adaptive temperatures"
        )


def refuse_v1(device_type: str, world_size: int) -> None:
    """Refuse vLLM's V1 model runner where ours would not do: it is made for one CPU process.

    Args:
        world_size: tensor-parallel times pipeline-parallel.

    Raises:
        UnsupportedError: says what to set instead.
    """
    if device_type != "cpu":
        raise UnsupportedError(
            "on a GPU adaptive temperatures need vLLM's V2 model runner: "
            "set VLLM_USE_V2_MODEL_RUNNER=1, or leave out the option that switches it off"
        )
    if world_size > 1:
        raise UnsupportedError(
            "on a CPU adaptive temperatures do not work with --tensor-parallel-size or "
            "--pipeline-parallel-size above 1"
        )
