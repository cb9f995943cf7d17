"""vLLM's worker with a model runner that chooses temperatures."""

from functools import cached_property
from pathlib import Path

from vllm import __version_tuple__
from vllm.distributed import get_pp_group
from vllm.platforms import current_platform

from adaptive_head.slots import SlotTable
from adaptive_head.vllm.compat import check_version, refuse_unsupported, refuse_v1

check_version(__version_tuple__)

# A clear refusal comes first.
from adaptive_head.vllm.heads import HeadLoader, load_heads  # noqa: E402

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

    # What the API process calls by vLLM's `collective_rpc`, on every rank.

    def add_head(self, name: str, generation: int, folder: str, digest: str) -> str | None:
        """Load a head beside those that serve. To be called again for as long as it is `LOADING`.

        An exception would end a multi-process executor's count of replies, so what is wrong is
        returned.

        Args:
            digest: of the head's files, as the API process has read them.

        Returns:
            LOADING, None where the head serves from the next step on, or why it cannot be loaded.
        """
        selector: SlotTable | None = self.model_runner.selector
        if selector is None or selector.has_head(name, generation):
            return None
        return self._loader.enter(selector, (name, generation), Path(folder), digest)

    def remove_head(self, name: str, generation: int) -> None:
        """Forget a head that no request has any more, or that not every rank could load."""
        if (selector := self.model_runner.selector) is not None:
            self._loader.forget((name, generation))
            selector.remove_head(name, generation)

    def count_choices(self) -> list[tuple[str, int, dict[float, int]]] | None:
        """Name and generation of each head here, and how often it has chosen each of its
        temperatures (a mean is none of them), before scale and bounds; None on a rank that does
        not sample."""
        if (selector := self.model_runner.selector) is None:
            return None
        return [(head.name, head.generation, head.counts) for head in selector.count_choices()]

    @cached_property
    def _loader(self) -> HeadLoader:
        return HeadLoader(self.vllm_config)
