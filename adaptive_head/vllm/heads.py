"""The heads of an engine, loaded and checked against the model that it serves."""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from vllm.logger import init_logger

from adaptive_head.checkpoint import HeadError, LoadedHead, load_head
from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.options import OptionError, Options
from adaptive_head.vllm.settings import read_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

logger = init_logger(__name__)


def load_heads(config: "VllmConfig") -> dict[str, LoadedHead]:
    """Load every head that the configuration names.

    Raises:
        HeadError: a head is damaged, or was made for another model.
        ValueError: the settings are wrong, see `read_settings`.
    """
    settings = read_settings(config.additional_config)
    is_verified = settings.verify_base and bool(settings.heads)
    fingerprint = fingerprint_served(config) if is_verified else None
    model_config = config.model_config
    hidden_size = model_config.get_hidden_size()
    heads = {}
    for name, folder in settings.heads.items():
        heads[name] = load_head(folder, hidden_size=hidden_size, fingerprint=fingerprint)
        made_for = heads[name].metadata.base_model
        if settings.verify_base and made_for.fingerprint is not None and fingerprint is None:
            raise HeadError(
                f"{folder}: the head was made for {made_for.name}, and {model_config.model} has "
                "no safetensors to compare with; if it is that model, say --no-verify-base "
                "(verify_base in --additional-config)"
            )
    return heads


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


def read_options(sampling_params: "SamplingParams", heads: dict[str, LoadedHead]) -> Options | None:
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
    if options is not None and options.policy == "head" and options.name not in heads:
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
