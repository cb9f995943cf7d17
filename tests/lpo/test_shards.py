"""Shards: every response once, whatever happens to the process that writes them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_head.lpo.records import DataError, Response
from adaptive_head.lpo.shards import MANIFEST_FILE, ShardWriter, read_shards
from tests.lpo.samples import make_response
from tests.programs import HANG_S


def write_all(folder: Path, responses: list[Response], shard_size: int = 4) -> None:
    with ShardWriter(folder, "key", shard_size) as writer:
        for response in responses:
            if response.key not in writer.keys:
                writer.write(response)
        writer.finish()


def make_responses(num: int) -> list[Response]:
    return [make_response(f"task/train/{n // 3}", n % 3) for n in range(num)]


@pytest.mark.parametrize("num", [0, 1, 4, 5, 11])
def test_what_is_written_is_read(tmp_path: Path, num: int) -> None:
    responses = make_responses(num)
    write_all(tmp_path, responses)
    assert read_shards(tmp_path) == responses
    shards = json.loads((tmp_path / MANIFEST_FILE).read_text())["shards"]
    assert [entry["num_responses"] for entry in shards.values()] == [4] * (num // 4) + (
        [num % 4] if num % 4 else []
    )


@pytest.mark.parametrize("num_written", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("num_torn_bytes", [0, 1, 40])
def test_a_torn_line_is_cut_off_and_nothing_is_lost_or_doubled(
    tmp_path: Path, num_written: int, num_torn_bytes: int
) -> None:
    responses = make_responses(11)
    with ShardWriter(tmp_path, "key", 4) as writer:
        for response in responses[:num_written]:
            writer.write(response)
    if num_torn_bytes:
        with sorted(tmp_path.glob("shard-*"))[-1].open("ab") as file:
            file.write(b'{"prompt_id": "task/train/3", "task": "torn"'[:num_torn_bytes])
    with pytest.raises(DataError, match="not complete"):
        read_shards(tmp_path)
    with ShardWriter(tmp_path, "key", 4) as writer:
        assert writer.keys == {response.key for response in responses[:num_written]}
    write_all(tmp_path, responses)
    assert read_shards(tmp_path) == responses


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_what_it_wrote(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from adaptive_head.lpo.shards import ShardWriter
from tests.lpo.samples import make_response
with ShardWriter(Path(sys.argv[1]), "key", 50) as writer:
    for n in range(10**9):
        if (f"p{n}", 0) not in writer.keys:
            writer.write(make_response(f"p{n}", 0))
            print(n, flush=True)
"""
    acknowledged = -1
    for _ in range(3):
        command = [sys.executable, "-c", program, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            assert int(line) > acknowledged
            if int(line) > acknowledged + 120:
                break
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
        acknowledged = int((rest or [line])[-1])
    with ShardWriter(tmp_path, "key", 50) as writer:
        written = sorted(int(prompt_id[1:]) for prompt_id, _ in writer.keys)
        writer.finish()
    assert written == list(range(len(written)))
    assert len(written) > acknowledged
    assert len(read_shards(tmp_path)) == len(written)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    write_all(tmp_path, make_responses(2))
    with pytest.raises(DataError, match="other settings"):
        ShardWriter(tmp_path, "another key", 4)
    write_all(tmp_path, make_responses(3))


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "key", 4), pytest.raises(DataError, match="another process"):
        ShardWriter(tmp_path, "key", 4)
    ShardWriter(tmp_path, "key", 4).close()


def test_a_response_cannot_come_twice(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "key", 4) as writer:
        writer.write(make_response("p", 0))
        with pytest.raises(DataError, match="twice"):
            writer.write(make_response("p", 0))


def test_a_changed_shard_is_found(tmp_path: Path) -> None:
    write_all(tmp_path, make_responses(5))
    shard = tmp_path / "shard-00000.jsonl"
    shard.write_text(shard.read_text().replace("hello", "hullo"))
    with pytest.raises(DataError, match=r"shard-00000\.jsonl"):
        ShardWriter(tmp_path, "key", 4)


def test_a_malformed_line_names_file_and_line(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "key", 9) as writer:
        writer.write(make_response("p", 0))
    with (tmp_path / "shard-00000.jsonl").open("a") as file:
        file.write('{"prompt_id": 3}\n')
    with pytest.raises(DataError, match=r"shard-00000\.jsonl, line 2"):
        ShardWriter(tmp_path, "key", 9)
    (tmp_path / MANIFEST_FILE).write_text("{")
    with pytest.raises(DataError, match="manifest"):
        ShardWriter(tmp_path, "key", 9)


def test_a_full_disk_keeps_what_was_written(tmp_path: Path) -> None:
    program = """
import resource, signal, sys
from pathlib import Path
from adaptive_head.lpo.shards import ShardWriter
from tests.lpo.samples import make_response
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with ShardWriter(Path(sys.argv[1]), "key", 50) as writer:
    for n in range(50):
        writer.write(make_response("p", n))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert "File too large" in process.stderr
    responses = [make_response("p", n) for n in range(50)]
    with ShardWriter(tmp_path, "key", 50) as writer:
        kept = set(writer.keys)
    assert 0 < len(kept) < 50
    assert kept == {("p", n) for n in range(len(kept))}
    write_all(tmp_path, responses, shard_size=50)
    assert read_shards(tmp_path) == responses
