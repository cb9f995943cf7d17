"""Records: what is written is read, and what is wrong names its file and line."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from adaptive_head.lpo.records import (
    DataError,
    Pair,
    Prompt,
    Response,
    Side,
    read_records,
    write_records,
)
from tests.lpo.samples import make_response

PROMPT = Prompt("p", "task", messages=({"role": "user", "content": "Hé\n?"},), reference={"n": 3})
SIDE = Side("p", 0, 1, 2)


@pytest.mark.parametrize(
    ("kind", "records"),
    [
        (Prompt, [PROMPT, Prompt("q", "task", text="Once\u2028upon")]),
        (Response, [make_response("p", 0), make_response("p", 1, text="\x85 \r\n \u2028")]),
        (Pair, [Pair("task", "fresh", SIDE, Side("p", 1, 0, 9))]),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, kind: type, records: list) -> None:
    write_records(tmp_path / "records.jsonl", records)
    assert list(read_records(tmp_path / "records.jsonl", kind)) == records


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"id": "p", "task": "t"}', '{"id": "p", "task": "t", "text": ""}', "\n"],
)
def test_a_malformed_line_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    write_records(path, [PROMPT])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2"):
        list(read_records(path, Prompt))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl is missing"):
        list(read_records(tmp_path / "nowhere.jsonl", Prompt))


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_is_finite(score: float) -> None:
    with pytest.raises(ValueError, match=r"scores\.correct"):
        make_response("p", 0, scores={"correct": score})


def test_every_token_has_a_temperature() -> None:
    with pytest.raises(ValueError, match="2 tokens but 1 temperatures"):
        make_response("p", 0, temperatures=(0.5,))
    with pytest.raises(ValueError, match="2 tokens but 3 logprobs"):
        make_response("p", 0, logprobs=(-0.5, -1.0, -2.0))


def test_records_of_before_log_probabilities_and_groups_are_read(tmp_path: Path) -> None:
    response = asdict(make_response("p", 0))
    prompt = asdict(PROMPT)
    del response["logprobs"], prompt["group"], prompt["kind"]
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(response) + "\n")
    (found,) = read_records(path, Response)
    assert found.logprobs is None
    path.write_text(json.dumps(prompt) + "\n")
    assert list(read_records(path, Prompt)) == [PROMPT]
