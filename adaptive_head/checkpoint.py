"""A head on disk: a folder with `head.safetensors` and `head.json`. Never pickle."""

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import safetensors
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load, save_file

from adaptive_head.abstention import Abstention
from adaptive_head.files import git_sha, package_versions, read_bounded, replace_file
from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.metadata import (
    BaseModelIdentity,
    FeatureProbe,
    HeadError,
    HeadMetadata,
    Setting,
    dump_metadata,
    parse_metadata,
)
from adaptive_head.options import Level, Selection

__all__ = [
    "METADATA_FILE",
    "WEIGHTS_FILE",
    "BaseModelIdentity",
    "FeatureProbe",
    "HeadError",
    "HeadMetadata",
    "LoadedHead",
    "change_head",
    "load_head",
    "read_metadata",
    "save_head",
    "upgrade_head",
    "write_metadata",
]

METADATA_FILE = "head.json"
WEIGHTS_FILE = "head.safetensors"
# Files come from outside. Twice the paper's head for a model of width 16,384 is 0.6 GB.
MAX_METADATA_BYTES: Final = 1 << 20
MAX_HEADER_BYTES: Final = 1 << 20
MAX_WEIGHTS_BYTES: Final = 1 << 30
# What decides, with the weights, which temperatures a head gives.
_JUDGED_FIELDS: Final = "choices", "level", "select", "abstain"


class LoadedHead(BaseModel):
    """A verified head: its metadata, its network (float32, on the CPU), and where it came from.

    `digest` is the SHA-256 of its two files: two ranks that have the same have the same head.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    metadata: HeadMetadata
    network: AdaptiveHead
    path: Path
    digest: str

    @property
    def level(self) -> Level:
        return self.metadata.level

    @property
    def select(self) -> Selection:
        return self.metadata.select

    @property
    def abstain(self) -> Abstention | None:
        return self.metadata.abstain


def save_head(
    folder: Path,
    network: AdaptiveHead,
    *,
    level: Level,
    base_model: BaseModelIdentity,
    trained: bool,
    training: dict[str, Any] | None = None,
    select: Selection = "argmax",
) -> HeadMetadata:
    """Write a head, with the git SHA and the package versions that made it.

    The weights are complete before `head.json` appears, so that a folder with metadata is whole.

    Args:
        training: how it was trained; any JSON object.
        select: what a request gets that does not say it.

    Raises:
        HeadError: the folder exists and is not an empty folder, or a weight is not finite.
    """
    _make_folder(folder)
    weights = {name: tensor.float().contiguous() for name, tensor in network.state_dict().items()}
    _check_finite(folder / WEIGHTS_FILE, weights)
    metadata = HeadMetadata(
        choices=tuple(Setting(temperature=value) for value in network.config.temperatures),
        level=level,
        select=select,
        hidden_size=network.config.hidden_size,
        layer_sizes=network.config.layer_sizes,
        base_model=base_model,
        trained=trained,
        training=training,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        git_sha=git_sha(),
        packages=package_versions(),
    )
    save_file(weights, folder / WEIGHTS_FILE)
    write_metadata(folder, metadata)
    return metadata


def write_metadata(folder: Path, metadata: HeadMetadata) -> None:
    """Write `head.json`; others see the old one or the new one, complete.

    Raises:
        HeadError: it could not be read again.
    """
    path = folder / METADATA_FILE
    content = dump_metadata(path, metadata)
    if len(content.encode()) > MAX_METADATA_BYTES:
        raise HeadError(f"{path}: training is too long: {MAX_METADATA_BYTES:,} bytes are read")
    replace_file(path, content)


def change_head(folder: Path, changes: Mapping[str, Any]) -> HeadMetadata:
    """Change what a head does by default; its weights stay.

    The gate judged the head with its earlier settings: its verdict goes where one of them changes.

    Args:
        changes: fields of `head.json`. An object's fields are put among those that it has.

    Returns:
        What `head.json` now holds.

    Raises:
        HeadError: the head is damaged, or a change is wrong; names the file and the field.
    """
    path = folder / METADATA_FILE
    before = load_head(folder).metadata
    content = json.loads(dump_metadata(path, before))
    for field, value in changes.items():
        earlier = content.get(field)
        is_merged = isinstance(value, Mapping) and isinstance(earlier, Mapping)
        content[field] = {**earlier, **value} if is_merged else value
    metadata = parse_metadata(path, json.dumps(content).encode())
    if any(getattr(metadata, field) != getattr(before, field) for field in _JUDGED_FIELDS):
        metadata = metadata.model_copy(update={"gate": None})
    write_metadata(folder, metadata)
    return metadata


def upgrade_head(folder: Path, output: Path | None = None) -> int:
    """Rewrite a head's `head.json` in the newest format. Its weights and its model stay.

    Args:
        output: a new or empty folder to write the head to; None rewrites it in place.

    Returns:
        The format that it had. Nothing is written in place where that is the newest.

    Raises:
        HeadError: the head is damaged, or `output` is not an empty folder.
    """
    metadata = load_head(folder).metadata
    content = json.loads(_read_file(folder, METADATA_FILE, MAX_METADATA_BYTES))
    found: int = content.get("format_version", 1)
    if output is not None:
        _make_folder(output)
        shutil.copyfile(folder / WEIGHTS_FILE, output / WEIGHTS_FILE)
    if output is not None or found != metadata.format_version:
        write_metadata(output or folder, metadata)
    return found


def _make_folder(folder: Path) -> None:
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise HeadError(f"{folder} is not an empty folder")
    folder.mkdir(parents=True, exist_ok=True)


def load_head(
    folder: Path,
    *,
    hidden_size: int | None = None,
    fingerprint: str | None = None,
    within: Collection[Path] | None = None,
) -> LoadedHead:
    """Read a head and check everything about it.

    Args:
        hidden_size: of the model that it is to serve, if known.
        fingerprint: of the model that it is to serve, if known (`fingerprint_model`).
        within: folders that its files must lie in, where links lead to; None allows any.

    Raises:
        HeadError: says which file is wrong, and how.
    """
    described = _read_file(folder, METADATA_FILE, MAX_METADATA_BYTES, within)
    metadata = parse_metadata(folder / METADATA_FILE, described)
    if hidden_size not in (None, metadata.hidden_size):
        raise HeadError(
            f"{folder}: the head reads hidden states of width {metadata.hidden_size}, "
            f"the model's have {hidden_size}"
        )
    expected = metadata.base_model.fingerprint
    if fingerprint is not None and expected not in (None, fingerprint):
        raise HeadError(
            f"{folder}: the head was made for {metadata.base_model.name} "
            f"(fingerprint {expected}), the model being served has fingerprint {fingerprint}"
        )
    shapes = _expected_shapes(metadata.config)
    # No number has more than 8 bytes.
    implied = MAX_HEADER_BYTES + 8 * sum(map(math.prod, shapes.values()))
    weighed = _read_file(folder, WEIGHTS_FILE, min(implied, MAX_WEIGHTS_BYTES), within)
    weights = _parse_weights(folder / WEIGHTS_FILE, weighed)
    # Before the network is made: a damaged size would ask for more memory than there is.
    _check_weights(folder / WEIGHTS_FILE, weights, shapes)
    network = AdaptiveHead.from_weights(metadata.config, weights).requires_grad_(False).eval()
    _check_logits(folder / WEIGHTS_FILE, network)
    return LoadedHead(
        metadata=metadata,
        network=network,
        path=folder,
        digest=hashlib.sha256(described + weighed).hexdigest(),
    )


def read_metadata(folder: Path) -> HeadMetadata:
    """Read and check `head.json` alone.

    Raises:
        HeadError: it is missing, not JSON, of a newer format, or a field is wrong.
    """
    content = _read_file(folder, METADATA_FILE, MAX_METADATA_BYTES)
    return parse_metadata(folder / METADATA_FILE, content)


def _read_file(
    folder: Path, name: str, max_bytes: int, within: Collection[Path] | None = None
) -> bytes:
    try:
        return read_bounded(folder / name, max_bytes, within)
    except (FileNotFoundError, NotADirectoryError):
        raise HeadError(f"{folder} is not a head: it has no {name}") from None
    except OSError as error:
        raise HeadError(f"{folder / name} cannot be read: {error}") from None


def _parse_weights(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    try:
        return load(content)
    except safetensors.SafetensorError as error:
        raise HeadError(f"{path} is damaged or truncated: {error}") from None


def _expected_shapes(config: HeadConfig) -> dict[str, list[int]]:
    shapes = {}
    for index, (wide, narrow) in enumerate(pairwise(config.widths)):
        shapes[f"layers.{index}.weight"] = [narrow, wide]
        shapes[f"layers.{index}.bias"] = [narrow]
    return shapes


def _check_weights(
    path: Path, weights: dict[str, torch.Tensor], expected: dict[str, list[int]]
) -> None:
    if missing := sorted(expected.keys() - weights.keys()):
        raise HeadError(f"{path}: missing {', '.join(missing)}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise HeadError(f"{path}: unknown {', '.join(unknown)}")
    for name, tensor in sorted(weights.items()):
        if list(tensor.shape) != expected[name]:
            raise HeadError(
                f"{path}: {name} has shape {list(tensor.shape)}, "
                f"{METADATA_FILE} says {expected[name]}"
            )
        if not tensor.is_floating_point():
            raise HeadError(f"{path}: {name} is {tensor.dtype}, not a float")
    _check_finite(path, weights)


def _check_finite(path: Path, weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        # As float32, since that is what the network will hold.
        if not tensor.float().isfinite().all():
            raise HeadError(f"{path}: {name} holds NaN or infinity")


def _check_logits(path: Path, network: AdaptiveHead) -> None:
    """Weights that are finite each can be too large together."""
    generator = torch.Generator().manual_seed(0)
    shape = 4, network.config.hidden_size
    # Larger than what enters the LM head of any known model. A process of vLLM's has a device of
    # its own for what says none.
    hidden = 100 * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    if not network(hidden).isfinite().all():
        raise HeadError(f"{path}: the logits are not finite: its weights are too large")
