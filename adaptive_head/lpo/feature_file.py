"""The features of responses on disk: one safetensors file, mapped into memory when it is read."""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from adaptive_head.lpo.records import Response
from adaptive_head.options import Level

# By descending size of their elements, so that each array is aligned.
_ARRAYS = {
    "choices": ("I64", torch.int64),
    "token_ids": ("I64", torch.int64),
    "logprobs": ("F32", torch.float32),
    "hidden": ("BF16", torch.bfloat16),
}


@dataclass(frozen=True)
class Features:
    """One row a token, or at the sequence level one row a response.

    Args:
        temperatures: K of them.
        hidden: bfloat16 [rows, d], the state from which the temperature is chosen: what enters the
            output layer (after the final norm) at the position that predicts the token, and at
            the sequence level at the prompt's last token.
        choices: int64 [rows], index of the temperature that was in force.
        logprobs: float32 [rows, K], log P(y_t | tau_k) of the realised token, in nats: that of
            softmax(logits / tau_k), and at tau 0 0.0 for the likeliest token, -inf for others. At
            the sequence level the sum over the response's tokens.
        token_ids: int64 [rows], y_t; zeros at the sequence level.
        starts: rows [start, stop) of each response, by prompt and sample.
    """

    temperatures: tuple[float, ...]
    hidden: torch.Tensor
    choices: torch.Tensor
    logprobs: torch.Tensor
    token_ids: torch.Tensor
    starts: dict[tuple[str, int], tuple[int, int]]


@dataclass(frozen=True)
class RowPlan:
    """Which rows each response has, and what of them is known without the model.

    Args:
        temperatures: K of them.
        level: whether a row is a token or a response.
        starts: rows [start, stop) of each response, by prompt and sample.
        choices: index of the temperature in force at each of a response's rows, by the same.
    """

    temperatures: tuple[float, ...]
    level: Level
    starts: dict[tuple[str, int], tuple[int, int]]
    choices: dict[tuple[str, int], list[int]]

    @property
    def num_rows(self) -> int:
        return max((stop for _, stop in self.starts.values()), default=0)


class FeatureFile:
    """A safetensors file that is written row by row, in any order, and appears when it is whole.

    Rows go to a file beside it, which takes its place at the end of the `with` block, and is
    deleted if the block fails.

    Args:
        folder: of the caches; must exist.
        key: of the features, for `load_features`.
        plan: of all rows.
        hidden_size: d.

    Raises:
        OSError: the folder is missing, or the disk is full.
    """

    def __init__(self, folder: Path, key: str, plan: RowPlan, hidden_size: int) -> None:
        self._path = _find_cache(folder, key)
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        self._plan = plan
        widths = {"choices": (), "token_ids": (), "logprobs": (len(plan.temperatures),)}
        shapes = {n: (plan.num_rows, *widths.get(n, (hidden_size,))) for n in _ARRAYS}
        index = [[*response, *rows] for response, rows in plan.starts.items()]
        metadata = {
            "key": key,
            "temperatures": json.dumps(plan.temperatures),
            "starts": json.dumps(index),
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, kind) in _ARRAYS.items():
            size = torch.Size(shapes[name]).numel() * kind.itemsize
            offsets = [end, end + size]
            header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": offsets}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {n: 8 + len(text) + header[n]["data_offsets"][0] for n in _ARRAYS}
        self._file = self._partial.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(8 + len(text) + end)

    def write(self, response: Response, *, hidden: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Put a response's rows in their place.

        Args:
            response: one of the plan's.
            hidden: [its rows, d], of any float dtype, on the CPU; kept as bfloat16.
            logprobs: [its rows, K], as `hidden`; kept as float32.

        Raises:
            OSError: the disk is full.
        """
        start, _ = self._plan.starts[response.key]
        choices = self._plan.choices[response.key]
        is_token = self._plan.level == "token"
        arrays = {
            "choices": torch.tensor(choices),
            "token_ids": torch.tensor(response.token_ids if is_token else [0]),
            "logprobs": logprobs,
            "hidden": hidden,
        }
        for name, (_, kind) in _ARRAYS.items():
            rows = arrays[name].to(kind).contiguous()
            row_size = rows[0].numel() * kind.itemsize
            self._file.seek(self._offsets[name] + start * row_size)
            self._file.write(rows.view(torch.uint8).numpy().tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            try:
                self._file.close()
            finally:
                self._partial.unlink()
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)


def load_features(folder: Path, key: str) -> Features | None:
    """The features of that key, mapped into memory, or None if they are not there whole."""
    path = _find_cache(folder, key)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        if metadata["key"] != key:
            return None
        temperatures = tuple(json.loads(metadata["temperatures"]))
        index = json.loads(metadata["starts"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    starts = {(prompt_id, sample): (start, stop) for prompt_id, sample, start, stop in index}
    return Features(temperatures=temperatures, starts=starts, **arrays)


def _find_cache(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"
