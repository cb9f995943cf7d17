"""Signals where vLLM loses them, without an engine; with one: test_lifecycle.py."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from server import signals
from tests.server.conftest import HANG_S

# The process above several API processes: what vLLM does at the first signal, and a child that
# writes down the signals that it gets.
ABOVE = """
import multiprocessing, os, signal, sys, time
from server import signals

def note(number, _):
    print(signal.Signals(number).name, flush=True)
    raise SystemExit

def child(pipe):
    signal.signal(signal.SIGINT, note)
    pipe.send("ready")
    time.sleep(600)

if __name__ == "__main__":
    signals.HURRIED_S = float(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: print("first", flush=True))
    signals.set_handlers_above()
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=[other])
    process.start()
    pipe.recv()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    process.join()
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("hurried_s", "rest_s", "code"), [(600, 0, 0), (0.5, 600, 130)], ids=["ends", "hangs"]
)
def test_a_second_signal_reaches_the_api_processes(tmp_path, hurried_s, rest_s, code):
    script = tmp_path / "above.py"
    script.write_text(ABOVE)
    paths = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
    ended = subprocess.run(
        [sys.executable, str(script), str(hurried_s), str(rest_s)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert ended.stdout.split() == ["first", "SIGINT"], ended.stderr
    assert ended.returncode == code


def test_vllms_start_is_prepared_in_the_block_only(monkeypatch):
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.launchers.api_server import entry

    calls = []
    for module, handlers in ((entry, "set_handlers_of_start"), (serve, "set_handlers_above")):
        setup = SimpleNamespace(module=module, handlers=handlers)
        monkeypatch.setattr(
            module, "setup_server", lambda *_, setup=setup, **__: calls.append(setup)
        )
        monkeypatch.setattr(signals, handlers, lambda handlers=handlers: calls.append(handlers))
    originals = entry.setup_server, serve.setup_server
    with signals.catch_signals():
        entry.setup_server("args", reuse_port=False)
        serve.setup_server("args", reuse_port=True)
    assert [getattr(call, "handlers", call) for call in calls] == [
        *["set_handlers_of_start"] * 2,
        *["set_handlers_above"] * 2,
    ]
    assert (entry.setup_server, serve.setup_server) == originals


def test_handlers_of_the_start_are_those_of_both_signals(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    signals.set_handlers_of_start()
    assert handlers == dict.fromkeys((signal.SIGINT, signal.SIGTERM), signals.end_start)
