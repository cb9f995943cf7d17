"""What cannot be measured is refused in a sentence, before an engine starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from benchmarks import arguments
from benchmarks.arguments import (
    check_files,
    check_lengths,
    read_arms,
    read_batches,
    read_options,
    read_sizes,
)


def test_options_are_json_or_text():
    pairs = [
        "dtype=float32",
        "max-model-len=64",
        'speculative_config={"method": "ngram"}',
        "seed=7",
    ]
    assert read_options(pairs) == {
        "dtype": "float32",
        "max_model_len": 64,
        "speculative_config": {"method": "ngram"},
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("seed", "NAME=JSON is wanted"),
        ("=7", "NAME=JSON is wanted"),
        ("sede=7", "EngineArgs have no sede"),
        ("worker-cls=x", "sets worker_cls itself"),
    ],
)
def test_other_options_are_refused(pair, message):
    with pytest.raises(typer.BadParameter, match=message):
        read_options([pair])


def test_arms_are_known_and_have_something_to_be_divided_by():
    assert read_arms("adaptive,ordinary,adaptive", False) == ["adaptive", "ordinary"]
    assert read_arms("ordinary,entropy", True) == ["ordinary", "entropy", "schedule", "constant"]
    with pytest.raises(typer.BadParameter, match="adptive is none of stock, ordinary"):
        read_arms("adptive,ordinary", False)
    for text in ("adaptive,stock", "ordinary", "ordinary,ordinary"):
        with pytest.raises(typer.BadParameter, match="ordinary and another one"):
            read_arms(text, False)


def test_sizes_are_positive_whole_numbers():
    assert read_sizes("--head-layers", "64,32") == [64, 32]
    assert read_sizes("--head-layers", "") == []
    assert read_batches("8,1,8") == [1, 8]
    for text in ("0", "-1", "a", "1.5", "1,,2"):
        with pytest.raises(typer.BadParameter, match=f"--batch {text}: positive whole numbers"):
            read_batches(text)
    with pytest.raises(typer.BadParameter, match="at least one"):
        read_batches("")


def test_files_are_checked_before_there_is_anything_to_write(tmp_path, monkeypatch):
    check_files(tmp_path / "x.json", tmp_path / "x.png")
    with pytest.raises(typer.BadParameter, match=r"--out .*folder that exists"):
        check_files(tmp_path / "nowhere" / "x.json", None)
    with pytest.raises(typer.BadParameter, match=r"--out .*not a file"):
        check_files(tmp_path, None)
    with pytest.raises(typer.BadParameter, match=r"must end with \.png"):
        check_files(None, tmp_path / "x.txt")
    monkeypatch.setattr(arguments, "find_spec", lambda _: None)
    check_files(tmp_path / "x.json", None)
    with pytest.raises(typer.BadParameter, match="needs matplotlib"):
        check_files(None, Path("x.png"))


def test_requests_must_fit_into_the_engine():
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=160),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
    )
    check_lengths(config, 8, 32, 128)
    with pytest.raises(typer.BadParameter, match=r"33 and .* 128 are together more than the 160"):
        check_lengths(config, 8, 33, 128)
    with pytest.raises(typer.BadParameter, match="--batch 9 is more than the 8 requests"):
        check_lengths(config, 9, 32, 128)
