"""Heads whose files somebody made to harm, or by mistake: refused soon, with a message to show."""

import json
import os

import pytest
import torch

from adaptive_head import AdaptiveHead, HeadConfig, load_head, save_head
from adaptive_head.checkpoint import MAX_HEADER_BYTES, MAX_METADATA_BYTES, BaseModelIdentity
from adaptive_head.files import read_bounded, replace_file
from adaptive_head.library import LOADED_FILE, HeadLibrary, LoadedHeads
from adaptive_head.metadata import HeadError

FILES = ("head.json", "head.safetensors")
CONFIG = HeadConfig(8, (0.0, 0.5, 1.0), (6, 4))
NUM_WEIGHTS = 8 * 6 + 6 + 6 * 4 + 4 + 4 * 3 + 3


def save(folder, scale=1.0):
    network = AdaptiveHead(CONFIG, seed=4)
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(scale)
    identity = BaseModelIdentity(name="tiny")
    save_head(folder, network, level="token", base_model=identity, trained=False)
    return folder


@pytest.fixture
def library(tmp_path):
    return tmp_path / "library"


@pytest.fixture
def folder(library):
    return save(library / "mine")


def refusal(folder, **kwargs) -> str:
    with pytest.raises(HeadError) as caught:
        load_head(folder, **kwargs)
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 1000
    return message


def change_json(folder, **changes) -> None:
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


LONG, HALF = "x" * 129, "\ud800"


@pytest.mark.parametrize("text", [LONG, HALF, "two\nlines", "\x1b[31m", "a\u202eb", "\0"])
@pytest.mark.parametrize(
    ("place", "make"),
    [
        ("base_model.name", lambda text: {"base_model": {"name": text}}),
        (
            "base_model.fingerprint",
            lambda text: {"base_model": {"name": "x", "fingerprint": text}},
        ),
        ("created", lambda text: {"created": text}),
        ("git_sha", lambda text: {"git_sha": text}),
        ("packages.torch", lambda text: {"packages": {"torch": text}}),
        ("packages.", lambda text: {"packages": {text: "1"}}),
        (
            "probe.tolerances.",
            lambda text: {
                "probe": {"prompts": [[1]], "temperatures": [1], "tolerances": {text: 1}}
            },
        ),
    ],
)
def test_a_name_is_printable_and_short(folder, place, make, text):
    change_json(folder, **make(text))
    assert f"{folder / 'head.json'}: {place}" in refusal(folder)


def test_names_of_128_characters_of_any_language_are_taken(folder):
    name = "Modell für 温度 " * 9
    change_json(folder, base_model={"name": name[:128]})
    assert load_head(folder).metadata.base_model.name == name[:128]


@pytest.mark.parametrize(
    "changes",
    [
        {f"{HALF}\n{LONG * 50}": 1},
        {"base_model": {"name": "x", f"{HALF}\n{LONG * 50}": 1}},
        {"level": f"{HALF}\n{LONG * 50}"},
        {"kind": HALF},
        {"training": {"note": HALF}},
        {"training": {"deep": json.loads("[" * 300 + "]" * 300)}},
    ],
)
def test_what_is_wrong_can_be_said_whatever_the_file_holds(folder, changes):
    change_json(folder, **changes)
    assert "head.json" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": [""] * 200_000},
        {"packages": {str(number): 1 for number in range(70_000)}},
        {"probe": {"prompts": [[[]] * 200_000], "temperatures": [1], "tolerances": {"x": 1}}},
        {str(number): 1 for number in range(70_000)},
    ],
)
def test_many_wrong_values_are_not_looked_at_one_by_one(folder, changes):
    change_json(folder, **changes)
    assert (folder / "head.json").stat().st_size < MAX_METADATA_BYTES
    assert "values besides training, at most" in refusal(folder)


def test_the_largest_probe_and_a_long_training_are_read(folder):
    prompts = [[100_000] * 256] * 64
    probe = {"prompts": prompts, "temperatures": [0.5] * 64, "tolerances": {"float32": 0.1}}
    training = {"losses": [0.25] * 50_000}
    change_json(folder, probe=probe, training=training)
    assert load_head(folder).metadata.training == training


def test_weights_are_read_no_further_than_the_metadata_says(folder):
    largest = MAX_HEADER_BYTES + 8 * NUM_WEIGHTS
    os.truncate(folder / "head.safetensors", largest + 1)
    assert f"it has {largest + 1:,} bytes, and at most {largest:,} are read" in refusal(folder)
    os.truncate(folder / "head.safetensors", largest)
    assert "damaged or truncated" in refusal(folder)


def test_weights_that_lead_to_no_temperature_are_refused(tmp_path):
    message = refusal(save(tmp_path / "large", 1e30))
    assert "head.safetensors: the logits are not finite" in message
    load_head(save(tmp_path / "small", 1e3))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/tty", "/proc/self/mem", "/", "pipe"])
def test_what_is_no_file_is_not_read(folder, tmp_path, name, device):
    if device == "pipe":
        os.mkfifo(tmp_path / device)
        device = tmp_path / device
    (folder / name).unlink()
    (folder / name).symlink_to(device)
    assert f"{name} " in refusal(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_that_comes_between_the_look_and_the_opening_is_not_waited_for(
    folder, monkeypatch, name
):
    """Every look finds the file as it was; what is opened is a pipe that nobody writes to."""
    found = (folder / name).stat()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    monkeypatch.setattr(type(folder), "stat", lambda *_, **__: found)
    with pytest.raises(OSError, match="not a regular file"):
        read_bounded(folder / name, 1 << 20)


@pytest.mark.parametrize("name", FILES)
def test_below_a_library_a_link_may_not_lead_out_of_it(folder, library, tmp_path, name):
    roots = HeadLibrary(library).roots
    load_head(folder, within=roots)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert f"{name} cannot be read: it is a link that leads elsewhere" in refusal(
        folder, within=roots
    )
    load_head(folder)


def test_kubernetes_mounts_are_links_within(folder, library):
    """`..data` is exchanged as a whole, and every file is a link into it."""
    (library / "..2026_11_28").mkdir()
    (library / "..data").symlink_to("..2026_11_28")
    (library / "mine").rename(library / "..2026_11_28" / "mine")
    (library / "mine").symlink_to("..data/mine")
    library = HeadLibrary(library)
    load_head(library.find("mine"), within=library.roots)


@pytest.mark.parametrize(
    "start", ["hub", "hub/models--org--heads", "hub/models--org--heads/snapshots/0a1b"]
)
def test_snapshots_of_the_hub_are_links_to_blobs(tmp_path, start):
    """As `hf download` leaves them; the last is the path that it prints."""
    repository = tmp_path / "hub/models--org--heads"
    snapshot = repository / "snapshots/0a1b"
    save(snapshot / "mine")
    (repository / "blobs").mkdir()
    for name in FILES:
        (snapshot / "mine" / name).rename(repository / "blobs" / name)
        (snapshot / "mine" / name).symlink_to(f"../../../blobs/{name}")
    library = HeadLibrary(tmp_path / start)
    found = library.find(str((snapshot / "mine").relative_to(tmp_path / start)))
    load_head(found, within=library.roots)
    stranger = save(tmp_path / "hub-2/models--org--other/blobs")
    (snapshot / "mine/head.json").unlink()
    (snapshot / "mine/head.json").symlink_to(stranger / "head.json")
    assert "leads elsewhere" in refusal(found, within=library.roots)


def test_what_was_loaded_is_remembered(library):
    library.mkdir()
    assert HeadLibrary(library).read_loaded() == LoadedHeads()
    loaded = LoadedHeads(heads={"a": "x/y"}, default="a", canaries={"a": ("b", 12.5)}, override=0.6)
    HeadLibrary(library).write_loaded(loaded)
    assert HeadLibrary(library).read_loaded() == loaded
    assert [path.name for path in library.iterdir()] == [LOADED_FILE]


def test_a_file_is_never_written_through_a_link_of_its_name(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("old")
    for name in ("file", "file.partial"):
        (tmp_path / name).symlink_to(precious)
    replace_file(tmp_path / "file", "new")
    assert precious.read_text() == "old" and (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()
