"""What the request log says of a request, without an engine; with one: test_faults.py."""

import json
import logging
import os
import subprocess
import sys

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from vllm.logger import _VllmLogRecordFactory

from server.record import MAX_TEXT_LEN, Recorder, current_record, note_request
from server.request_log import RequestLog, check_target
from tests.server.conftest import HANG_S, wait_until
from tests.server.fakes import make_output, make_report, sample

LOST = "adaptive_request_log_lost_total"


class Body:
    """The two fields of a request that are noted."""

    def __init__(self, model, stream=False):
        self.model = model
        self.stream = stream


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def serve(tmp_path, registry):
    """Answers a request by a function, and returns the lines of the log."""

    async def run(answer, path="/v1/completions", scope=None, **options):
        file = tmp_path / "requests.jsonl"
        log = RequestLog(str(file), registry)
        app = Starlette(routes=[Route("/{rest:path}", answer, methods=["POST"])])
        recorder = Recorder(app, paths=("/v1/completions",), observers=[Broken(), log])
        transport = httpx.ASGITransport(recorder, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post(path, **options)
        log.close()
        lines = file.read_text().splitlines()
        assert all(line.isascii() and len(line) < 4096 for line in lines)
        return [json.loads(line) for line in lines]

    return run


class Broken:
    """An observer that fails must not fail the request, nor keep it from the others."""

    def begin(self, record, scope):
        raise OSError("disk")

    def end(self, record):
        raise OSError("disk")


async def refuse(request):
    error = {"message": "secret prompt", "type": "BadRequestError", "param": "temperature"}
    return JSONResponse({"error": error}, status_code=400)


async def test_an_ordinary_request_is_one_line(serve):
    async def answer(request):
        note_request(Body("smol"))
        current_record().begin(None)
        output = make_output((0, [0.3, 0.7], "stop"), finished=True)
        current_record().read(output, is_first=True)
        current_record().end()
        return JSONResponse({})

    (line,) = await serve(answer, headers={"X-Request-Id": "mine"})
    duration = line.pop("duration_ms")
    assert 0 <= duration < 10_000
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "mine",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "ttft_ms": None,
        "model": "smol",
        "stream": False,
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "finish_reasons": ["stop"],
        "aborted": False,
    }


async def test_an_adaptive_request_says_its_temperatures(serve):
    async def answer(request):
        report = make_report({"report": "tokens"}, num_choices=2, takes_many_prompts=True)
        for prompt_report in (report.begin_prompt(), report.begin_prompt()):
            current_record().begin(prompt_report)
            current_record().begin(prompt_report)
            output = make_output((0, [0.3, 0.7], None), (1, [1.0], "stop"), finished=True)
            current_record().read(output, is_first=True)
            prompt_report.read(output)
            current_record().end()
            current_record().end()
        return JSONResponse({})

    (line,) = await serve(answer)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (4, 6)
    assert line["adaptive"] == {
        "policy": "head",
        "head": "tok",
        "level": "token",
        "report": "tokens",
        "mean": 0.666667,
        "min": 0.3,
        "max": 1.0,
    }


async def test_other_routes_are_not_recorded(serve):
    async def answer(request):
        assert current_record() is None
        note_request(Body("smol"))
        return JSONResponse({})

    assert await serve(answer, path="/v1/embeddings") == []


async def test_a_refusal_says_which_field_but_not_what_was_in_it(serve):
    (line,) = await serve(refuse)
    assert (line["level"], line["status"]) == ("warning", 400)
    assert line["error"] == {"type": "BadRequestError", "param": "temperature"}
    assert "secret" not in json.dumps(line)


async def test_an_exception_is_a_500(serve):
    async def answer(request):
        raise RuntimeError("boom")

    (line,) = await serve(answer)
    assert (line["level"], line["status"]) == ("error", 500)


async def test_a_stream_that_breaks_off_is_an_error(serve):
    async def answer(request):
        async def chunks():
            yield "data: {}\n\n"
            raise RuntimeError("boom")

        return StreamingResponse(chunks())

    (line,) = await serve(answer)
    assert (line["level"], line["status"], line["aborted"]) == ("error", 200, False)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ('data: {"error": {"type": "InternalServerError"}}\n\n', "InternalServerError"),
        ('event: error\ndata: {"type": "error", "code": "server_error"}\n\n', "server_error"),
    ],
)
async def test_an_error_in_a_stream_is_an_error(serve, event, kind):
    async def chunks():
        yield 'data: {"id": 1}\n\n'
        yield event
        yield "data: [DONE]\n\n"

    async def answer(request):
        return StreamingResponse(chunks())

    (line,) = await serve(answer)
    assert (line["level"], line["status"]) == ("error", 200)
    assert line["error"] == {"type": kind, "param": None}


@pytest.mark.parametrize("text", ["x" * 1_000_000, "a\nb\r\x00\x1b[0m", "\ud800", "ü" * 300])
async def test_no_text_of_a_clients_breaks_a_line_or_makes_it_long(serve, text):
    async def answer(request):
        note_request(Body(text))
        error = {"type": "NotFoundError", "param": "y" * 1_000_000}
        return JSONResponse({"error": error}, status_code=404)

    (line,) = await serve(answer, headers={"X-Request-Id": "z" * 1_000_000})
    assert line["model"] == text[:MAX_TEXT_LEN].replace("\ud800", "?")
    assert line["request_id"] == "z" * MAX_TEXT_LEN


async def test_a_client_that_leaves_is_aborted_and_its_last_tokens_are_awaited(tmp_path, registry):
    log = RequestLog(str(tmp_path / "log"), registry)
    records = []

    async def answer(scope, receive, send):
        record = current_record()
        records.append(record)
        record.begin(None)
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/p/v1", "root_path": "/p", "headers": []}
    await Recorder(answer, paths=["/v1"], observers=[log])(scope, receive, send)
    (record,) = records
    record.read(make_output((0, [0.3], "abort"), finished=True), is_first=True)
    record.end()
    log.close()
    line = json.loads((tmp_path / "log").read_text())
    assert (line["aborted"], line["status"], line["level"]) == (True, None, "info")
    assert (line["path"], line["completion_tokens"]) == ("/v1", 1)


def test_a_disk_that_hangs_loses_lines_and_holds_up_nobody(tmp_path, registry, monkeypatch):
    """The disk is a pipe that nobody reads; what it holds already leaves no room for a line."""
    monkeypatch.setattr("server.request_log.MAX_WAITING_LINES", 3)
    monkeypatch.setattr("server.request_log.CLOSE_TIMEOUT_S", 0.1)
    os.mkfifo(tmp_path / "log")
    with open(os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)) as reader:
        log = RequestLog(str(tmp_path / "log"), registry)
        with open(tmp_path / "log", "wb", buffering=0) as filler:
            os.set_blocking(filler.fileno(), False)
            while filler.write(b"\n"):
                pass
        log.write({"number": 0})
        wait_until(log.queue.empty, seconds=10)
        for number in range(1, 6):
            log.write({"number": number})
        assert sample(registry, LOST) == 2
        log.close()
        os.set_blocking(reader.fileno(), True)
        lines = (json.loads(line) for line in reader if line.strip())
        assert [line["number"] for line in lines] == [0, 1, 2, 3]


def test_a_full_disk_loses_lines_and_raises_nothing(registry):
    log = RequestLog("/dev/full", registry)
    for number in range(3):
        log.write({"number": number})
    log.close()
    assert sample(registry, LOST) == 3
    log.write({"number": 3})
    assert sample(registry, LOST) == 4, "a line after the end"


def test_a_log_comes_back_when_its_device_does(tmp_path, registry):
    """The path leads to a full device, then to one that has room."""
    path = tmp_path / "log"
    path.symlink_to("/dev/full")
    log = RequestLog(str(path), registry)
    for number in range(2):
        log.write({"number": number})
    wait_until(lambda: sample(registry, LOST) >= 2, seconds=10)
    path.unlink()
    path.symlink_to(tmp_path / "file")
    for number in range(2, 4):
        log.write({"number": number})
    log.close()
    lines = (tmp_path / "file").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [2, 3]
    assert sample(registry, LOST) == 2


# Allows itself files of 100 bytes, so that the fourth line fits in part, then longer ones again.
FILLS_UP = """
import resource, signal, sys
from prometheus_client import CollectorRegistry
from server.request_log import RequestLog
from tests.server.conftest import HANG_S, wait_until
from tests.server.fakes import sample

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
registry = CollectorRegistry()
log = RequestLog(sys.argv[1], registry)
_, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit))
for number in range(5):
    log.write({"number": number, "text": "x" * 8})
wait_until(lambda: sample(registry, "adaptive_request_log_lost_total") >= 2, seconds=60)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
log.write({"number": 5, "text": "x" * 8})
log.close()
"""


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    file = tmp_path / "log"
    subprocess.run([sys.executable, "-c", FILLS_UP, str(file)], check=True, timeout=HANG_S)
    *whole, cut, last = file.read_text().splitlines()
    assert [json.loads(line)["number"] for line in [*whole, last]] == [0, 1, 2, 5]
    assert cut == '{"number":3,"text":"xxxxxxxx"}'[: 100 - 3 * 31]


def test_a_log_that_was_moved_away_is_opened_anew(tmp_path, registry):
    file = tmp_path / "log"
    log = RequestLog(str(file), registry)
    log.write({"number": 0})
    wait_until(file.read_text)
    file.rename(tmp_path / "old")
    log.write({"number": 1})
    log.close()
    assert json.loads((tmp_path / "old").read_text())["number"] == 0
    assert json.loads(file.read_text())["number"] == 1


def test_a_folder_that_goes_loses_lines_until_it_is_back(tmp_path, registry):
    file = tmp_path / "logs" / "log"
    file.parent.mkdir()
    log = RequestLog(str(file), registry)
    file.unlink()
    file.parent.rmdir()
    for number in range(2):
        log.write({"number": number})
    wait_until(lambda: sample(registry, LOST) >= 2)
    file.parent.mkdir()
    log.write({"number": 2})
    log.close()
    assert file.read_text() == '{"number":2}\n'


def test_the_standard_output_gets_lines_without_a_prefix(capfd, registry):
    log = RequestLog("-", registry)
    log.write({"number": 0})
    log.close()
    assert capfd.readouterr().out == '{"number":0}\n'


def test_what_vllm_adds_to_log_records_is_not_in_a_line(tmp_path, registry):
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_VllmLogRecordFactory(logging.LogRecord))
    try:
        log = RequestLog(str(tmp_path / "log"), registry)
        log.write({"number": 0})
        log.close()
    finally:
        logging.setLogRecordFactory(factory)
    assert (tmp_path / "log").read_text() == '{"number":0}\n'


def test_processes_can_share_a_file(tmp_path):
    logs = [RequestLog(str(tmp_path / "log"), CollectorRegistry()) for _ in range(4)]
    for number in range(500):
        for log in logs:
            log.write({"number": number, "text": "x" * 500})
    for log in logs:
        log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(json.loads(line)["number"] for line in lines) == sorted([*range(500)] * 4)


def test_a_log_that_cannot_be_written_is_refused_by_name(tmp_path):
    for target in (tmp_path / "gone" / "log", tmp_path, "/dev/full"):
        with pytest.raises(ValueError, match=f"--request-log {target}: "):
            check_target(str(target))


def test_the_start_is_marked(tmp_path):
    check_target("-")
    check_target(str(tmp_path / "log"))
    assert json.loads((tmp_path / "log").read_text())["event"] == "start"
