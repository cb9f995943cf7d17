"""Heads of format 1: they are read, and rewritten in the newest format."""

import hashlib
import json

import pytest
from safetensors.torch import load_file, save_file

from adaptive_head.checkpoint import (
    BaseModelIdentity,
    HeadError,
    load_head,
    save_head,
    upgrade_head,
)
from adaptive_head.head import AdaptiveHead, HeadConfig

CONFIG = HeadConfig(8, (0.0, 0.5, 1.0), (6, 4))
IDENTITY = BaseModelIdentity(name="tiny", fingerprint="0123456789abcdef")


def change_json(folder, **changes) -> None:
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder) -> str:
    with pytest.raises(HeadError) as caught:
        load_head(folder)
    return str(caught.value)


# As the first releases wrote it, except for the numbers.
FORMAT_1 = {
    "format_version": 1,
    "temperatures": [0.0, 0.5, 1.0],
    "level": "sequence",
    "hidden_size": 8,
    "layer_sizes": [6, 4],
    "base_model": {"name": "tiny", "fingerprint": "0123456789abcdef"},
    "trained": True,
    "training": {"temperature_shares": {"0.0": 0.5, "0.5": 0.25, "1.0": 0.25}, "loss": "eq10"},
    "created": "2026-11-24T00:42:41+00:00",
    "git_sha": "7a77d06aca2ae8958b2dddf4b84eb0049d013034",
    "packages": {"python": "3.11.7", "torch": "2.13.0+cpu"},
}


@pytest.fixture
def old_folder(tmp_path):
    folder = tmp_path / "head"
    network = AdaptiveHead(CONFIG, seed=4)
    save_head(folder, network, level="token", base_model=IDENTITY, trained=False)
    (folder / "head.json").write_text(json.dumps(FORMAT_1, indent=2))
    return folder


def test_format_1_is_read(old_folder):
    metadata = load_head(old_folder, fingerprint=IDENTITY.fingerprint).metadata
    assert metadata.temperatures == (0.0, 0.5, 1.0) and metadata.config == CONFIG
    assert (metadata.kind, metadata.select) == ("categorical", "argmax")
    assert (metadata.abstain, metadata.probe) == (None, None)
    assert metadata.training_shares == (0.5, 0.25, 0.25)
    same = FORMAT_1.keys() - {"format_version", "temperatures"}
    assert metadata.model_dump(mode="json", include=same) == {name: FORMAT_1[name] for name in same}


def test_format_1_could_leave_its_version_out(old_folder):
    path = old_folder / "head.json"
    path.write_text(json.dumps({k: v for k, v in FORMAT_1.items() if k != "format_version"}))
    assert load_head(old_folder).metadata.format_version == 2


@pytest.mark.parametrize("field", ["choices", "kind", "select", "abstain", "probe", "surprise"])
def test_format_1_has_none_of_the_later_fields(old_folder, field):
    change_json(old_folder, **{field: None})
    path = old_folder / "head.json"
    assert refusal(old_folder) == f"{path}: {field}: Extra inputs are not permitted"


@pytest.mark.parametrize(
    ("temperatures", "complaint"),
    [
        ([1.0, 0.5, 0.0], "temperatures: temperatures must be strictly increasing"),
        ([0.0, "x", 1.0], "temperatures.1: must be a number"),
    ],
)
def test_messages_about_format_1_name_its_own_fields(old_folder, temperatures, complaint):
    change_json(old_folder, temperatures=temperatures)
    assert f"{old_folder / 'head.json'}: {complaint}" in refusal(old_folder)


def test_an_upgrade_leaves_the_weights_and_all_that_was_known(old_folder):
    weights = (old_folder / "head.safetensors").read_bytes()
    before = load_head(old_folder)
    assert upgrade_head(old_folder) == 1
    written = json.loads((old_folder / "head.json").read_text())
    assert written == {
        **{name: value for name, value in FORMAT_1.items() if name != "temperatures"},
        "format_version": 2,
        "kind": "categorical",
        "choices": [0.0, 0.5, 1.0],
        "select": "argmax",
        "abstain": None,
        "probe": None,
        "gate": None,
    }
    assert (old_folder / "head.safetensors").read_bytes() == weights
    assert load_head(old_folder).metadata == before.metadata
    assert sorted(path.name for path in old_folder.iterdir()) == ["head.json", "head.safetensors"]


def test_a_second_upgrade_writes_nothing(old_folder):
    upgrade_head(old_folder)
    before = (old_folder / "head.json").stat()
    assert upgrade_head(old_folder) == 2
    after = (old_folder / "head.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_upgrade_into_another_folder_leaves_the_first(old_folder, tmp_path):
    before = (old_folder / "head.json").read_bytes()
    for number, expected in enumerate([1, 1]):
        output = tmp_path / f"new{number}" / "deep"
        assert upgrade_head(old_folder, output) == expected
        assert load_head(output).metadata == load_head(old_folder).metadata
    # A head of the newest format is copied.
    assert upgrade_head(output, tmp_path / "copy") == 2
    names = "head.json", "head.safetensors"
    digests = [
        [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
        for folder in (output, tmp_path / "copy")
    ]
    assert digests[0] == digests[1]
    assert (old_folder / "head.json").read_bytes() == before


def test_a_damaged_head_is_not_upgraded(old_folder, tmp_path):
    before = (old_folder / "head.json").read_bytes()
    weights = load_file(old_folder / "head.safetensors")
    del weights["layers.1.bias"]
    save_file(weights, old_folder / "head.safetensors")
    for output in (None, tmp_path / "new"):
        with pytest.raises(HeadError, match=r"missing layers\.1\.bias"):
            upgrade_head(old_folder, output)
    assert (old_folder / "head.json").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_an_upgrade_overwrites_no_other_folder(old_folder, tmp_path):
    for output in (old_folder, tmp_path):
        with pytest.raises(HeadError, match="is not an empty folder"):
            upgrade_head(old_folder, output)
