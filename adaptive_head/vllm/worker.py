"""vLLM's worker with a model runner that chooses temperatures."""

from vllm import __version_tuple__
from vllm.distributed import get_pp_group
from vllm.platforms import current_platform

from adaptive_head.vllm.compat import check_version, refuse_unsupported, refuse_v1

check_version(__version_tuple__)

from adaptive_head.vllm.heads import load_heads  # noqa: E402 (a clear refusal comes first)

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class AdaptiveWorker(PlatformWorker):
    """The platform's worker; its model runner is exchanged once it exists.

    Raises, at start-up:
        UnsupportedError: the configuration cannot be served.
        HeadError: a head is damaged, or was made for another model.
    """

    def init_device(self) -> None:
        """Build vLLM's model runner, then let ours take its place."""
        refuse_unsupported(self.vllm_config)
        if not self.use_v2_model_runner:
            refuse_v1(current_platform.device_type, self.parallel_config.world_size)
        super().init_device()
        if self.use_v2_model_runner:
            from adaptive_head.vllm.runner_v2 import AdaptiveRunnerV2 as mixin
        else:
            from adaptive_head.vllm.runner_v1 import AdaptiveRunnerV1 as mixin
        stock = type(self.model_runner)
        self.model_runner.__class__ = type(mixin.__name__, (mixin, stock), {})

    def load_model(self, **kwargs: bool) -> None:
        """Load the model, then the heads: outside vLLM's pool of weights, which sleep discards."""
        super().load_model(**kwargs)
        if get_pp_group().is_last_rank:
            self.model_runner.load_heads(load_heads(self.vllm_config))
