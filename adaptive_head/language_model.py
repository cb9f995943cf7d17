"""A language model's folder: what a head must know of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from adaptive_head.checkpoint import BaseModelIdentity
from adaptive_head.embedded_model import EMBEDDED_NAME, prepare
from adaptive_head.fingerprint import fingerprint_model

EMBEDDED = "embedded"


@dataclass(frozen=True)
class LanguageModel:
    """A frozen language model on disk: a Hugging Face folder.

    Args:
        hidden_size: d, the width of its last hidden state.
    """

    folder: Path
    identity: BaseModelIdentity
    hidden_size: int


def find_language_model(name: str) -> LanguageModel:
    """The model of that name: `embedded`, a folder, or one on the Hugging Face hub.

    Raises:
        ValueError: there is none, or its `config.json` is not as expected.
    """
    folder = prepare() if name == EMBEDDED else Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"model: {name!r} is neither {EMBEDDED!r}, a folder, nor on the hub ({reason})"
            ) from None
    config = read_model_config(folder)
    published = EMBEDDED_NAME if name == EMBEDDED else find_model_name(folder, config)
    identity = BaseModelIdentity(name=published, fingerprint=fingerprint_model(folder))
    return LanguageModel(folder, identity, find_hidden_size(folder, config))


def read_model_config(model: Path) -> dict[str, Any]:
    """A model folder's `config.json`."""
    path = model / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{model} is not a model folder: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def find_hidden_size(model: Path, config: dict[str, Any]) -> int:
    """The width of a model's last hidden state; multimodal models keep it in `text_config`."""
    text_config = config.get("text_config")
    inner = text_config.get("hidden_size") if isinstance(text_config, dict) else None
    size = config.get("hidden_size") or inner
    if type(size) is not int or size < 1:
        raise ValueError(f"{model / 'config.json'} has no hidden_size; give it as --hidden-size")
    return size


def find_model_name(model: Path, config: dict[str, Any]) -> str:
    """The name that the model was published under, or its folder's where only that is known."""
    published = config.get("_name_or_path")
    # It can be a path on the machine that saved the model, which is nobody's business.
    if isinstance(published, str) and published and not is_path(published):
        return published
    return model.resolve().name


def is_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1
