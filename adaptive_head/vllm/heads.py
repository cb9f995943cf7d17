"""The heads of an engine, loaded and checked against the model that it serves."""

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from vllm.logger import init_logger

from adaptive_head.checkpoint import HeadError, LoadedHead, load_head
from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.options import OptionError, Options
from adaptive_head.slots import SlotTable
from adaptive_head.vllm import LOADING
from adaptive_head.vllm.ranks import gather_states
from adaptive_head.vllm.settings import read_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

logger = init_logger(__name__)


def load_heads(config: "VllmConfig") -> dict[str, LoadedHead]:
    """Load every head that the configuration names.

    Raises:
        HeadError: a head is damaged, was made for another model, or is another one on a rank that
            samples together with this one.
        ValueError: the settings are wrong, see `read_settings`.
    """
    settings = read_settings(config.additional_config)
    verifier = HeadVerifier(config)
    heads: dict[str, LoadedHead] = {}
    try:
        heads |= {name: verifier.load(folder) for name, folder in settings.heads.items()}
    finally:
        # Ranks on several machines read folders, and maybe command lines, of their own. A rank that
        # failed must still join the collective, or the others would block.
        found = gather_states({name: head.digest for name, head in heads.items()})
    for name in sorted({name for other in found for name in other}):
        if len({other.get(name) for other in found}) > 1:
            raise HeadError(f"head {name} is not the same on all ranks: compare its files")
    return heads


class HeadVerifier:
    """Loads heads, and checks them against the model that an engine serves."""

    def __init__(self, config: "VllmConfig") -> None:
        self._config = config
        self._is_verified = read_settings(config.additional_config).verify_base

    @cached_property
    def _fingerprint(self) -> str | None:
        return fingerprint_served(self._config) if self._is_verified else None

    def load(self, folder: Path, within: Collection[Path] | None = None) -> LoadedHead:
        """Load a head.

        Args:
            within: folders that its files must lie in, where links lead to; None allows any.

        Raises:
            HeadError: it is damaged, or was made for another model.
        """
        model_config = self._config.model_config
        head = load_head(
            folder,
            hidden_size=model_config.get_hidden_size(),
            fingerprint=self._fingerprint,
            within=within,
        )
        made_for = head.metadata.base_model
        if self._is_verified and made_for.fingerprint is not None and self._fingerprint is None:
            raise HeadError(
                f"{folder}: the head was made for {made_for.name}, and {model_config.model} has "
                "no safetensors to compare with; if it is that model, say --no-verify-base "
                "(verify_base in --additional-config)"
            )
        return head


class HeadLoader:
    """Loads heads in a thread of its own, so that the worker goes on meanwhile."""

    def __init__(self, config: "VllmConfig") -> None:
        self._verifier = HeadVerifier(config)
        self._executor = ThreadPoolExecutor(1, "head-loader")
        self._loading: dict[tuple[str, int], Future[LoadedHead]] = {}

    def poll(self, key: tuple[str, int], folder: Path, digest: str) -> LoadedHead | None:
        """Begin to load a head at the first call for its key; the head, or None while it loads.

        Returns the same head until `forget`: other ranks may not have read it yet.

        Args:
            digest: that the head must have.

        Raises:
            HeadError: it is damaged, was made for another model, or has another digest. The next
                call begins anew.
        """
        if key not in self._loading:
            self._loading[key] = self._executor.submit(self._verifier.load, folder)
        loading = self._loading[key]
        if not loading.done():
            return None
        try:
            head = loading.result()
            if head.digest != digest:
                raise HeadError(f"{folder} has changed while it was being loaded")
        except BaseException:
            self.forget(key)
            raise
        return head

    def enter(
        self, table: SlotTable, key: tuple[str, int], folder: Path, digest: str
    ) -> str | None:
        """Let a head serve, once all ranks that sample together have loaded it.

        A rank without it would sample its requests as ordinary ones, and take no part in the
        collectives of the others: all get it between the same two steps, or none does.

        Returns:
            LOADING, None where it serves, or why it cannot on one of the ranks.
        """

        def attempt(action: Callable[[], bool]) -> list[str | None]:
            try:
                state = None if action() else LOADING
            except Exception as error:
                logger.exception("Cannot load head %s", key[0])
                state = str(error) or repr(error)
            return gather_states(state)

        def add() -> bool:
            head = self.poll(key, folder, digest)
            if head is not None:
                table.add_head(*key, head.network)
            return head is not None

        states = attempt(lambda: self.poll(key, folder, digest) is not None)
        if not any(states):
            states = attempt(add)
            if any(states):
                table.remove_head(*key)
            self.forget(key)
        # What is wrong on one rank, before what takes another one its time.
        return min(filter(None, states), key=lambda state: state == LOADING, default=None)

    def forget(self, key: tuple[str, int]) -> None:
        """Drop a head that has been loaded, or may be loading."""
        if (loading := self._loading.pop(key, None)) is not None:
            loading.cancel()


def fingerprint_served(config: "VllmConfig") -> str | None:
    """The fingerprint of the model that an engine serves, from a folder or the hub's cache."""
    model_config = config.model_config
    folder = Path(model_config.model)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(
                    model_config.model,
                    revision=model_config.revision,
                    cache_dir=config.load_config.download_dir,
                    local_files_only=True,
                )
            )
        except (HFValidationError, LocalEntryNotFoundError):
            return None
    return fingerprint_model(folder)


def read_options(sampling_params: "SamplingParams", selector: SlotTable) -> Options | None:
    """The options of a request that has reached the worker; None for an ordinary one.

    Options are resolved at admission, so a wrong entry is that of a caller who went around it.
    An exception here would end the engine and every request in it: such a request is served as
    an ordinary one, and the log says so.
    """
    try:
        options = Options.from_extra_args(sampling_params.extra_args)
    except (OptionError, TypeError) as error:
        logger.error("Ignoring a request's adaptive options: %s", error)
        return None
    if options is not None and not selector.can_serve(options):
        logger.error("Ignoring a request's adaptive options: no head %r", options.name)
        return None
    # Another one would be applied as well, and a greedy batch has none that ours could replace.
    if options is not None and sampling_params.temperature != 1.0:
        logger.error(
            "Ignoring a request's adaptive options: its own temperature is %g, not 1",
            sampling_params.temperature,
        )
        return None
    return options
