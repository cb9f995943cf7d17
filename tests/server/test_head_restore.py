"""What was changed while a server ran is so again after a restart; nothing of it prevents one."""

import asyncio
import json
import logging
import os
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from vllm.entrypoints.openai.models.protocol import BaseModelPath

from adaptive_head.library import LOADED_FILE
from server.limits.queue import Queue
from server.plugin import AdaptiveEndpoints
from tests.server import test_head_control as control
from tests.server.test_head_control import AT_START, assert_refused, choose, settle, wait_until

folder, save, setup = control.folder, control.save, control.setup


@pytest.fixture
def logged(caplog, monkeypatch):
    # vLLM's loggers do not propagate, which keeps them from caplog.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm")
    return caplog


@pytest.fixture
def restart(setup):
    """A server with the same command line and the same folder of heads."""

    async def restart():
        server = await setup()
        await server.app.state.adaptive.control.restore()
        await settle()
        return server

    return restart


async def change(server, method, path="", **body):
    response = await server.send(method, path, body)
    assert response.is_success, response.text


async def test_heads_their_default_and_their_canaries_survive_a_restart(setup, save, restart):
    server = await setup()
    save("c-1", level="sequence")
    save("b-2", level="sequence")
    await change(server, "POST", name="c", folder="c-1", default=True)
    await change(server, "POST", name="b", folder="b-2")
    await change(server, "PATCH", "/a", canary={"head": "c", "percent": 12.5})
    before = (await server.send("GET")).json()
    loaded = [{("a", 0), ("c", 1), ("b", 2)}] * 4
    for _ in range(2):
        server = await restart()
        after = (await server.send("GET")).json()
        assert after == before
        await wait_until(lambda engines=server.engines: engines.loaded == loaded)
    assert choose(server.registry, head="b")[0].level == "sequence"
    assert choose(server.registry)[0].name == "c"


async def test_what_was_ended_does_not_come_back(setup, save, restart):
    server = await setup()
    save("c")
    await change(server, "POST", name="c")
    await change(server, "PATCH", "/a", canary={"head": "c", "percent": 10})
    await change(server, "PATCH", "/a", canary=None)
    await change(server, "DELETE", "/c")
    await change(server, "PATCH", "/b", default=True)
    await change(server, "PATCH", "/a", default=True)
    server = await restart()
    assert [head.name for head in server.registry] == ["a", "b"]
    assert server.registry.default == "a" and not server.registry.canaries
    assert server.engines.loaded == AT_START


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"heads": {"c": 5}}',
    b'{"heads": ["c"]}',
    b'{"canaries": {"a": ["b", NaN]}}',
    b'{"canaries": {"a": ["b", 101]}}',
    b'{"default": "\\ud800"}',
    b'{"unknown": 1}',
    b"[" * 10_000,
    b" " * (1 << 21),
]


@pytest.mark.parametrize("content", [*DAMAGED, "pipe"], ids=range(len(DAMAGED) + 1))
async def test_a_damaged_file_is_logged_and_replaced_by_the_next_change(
    restart, save, folder, logged, content
):
    path = folder / LOADED_FILE
    os.mkfifo(path) if content == "pipe" else path.write_bytes(content)
    async with asyncio.timeout(60):
        server = await restart()
    assert f"Neither heads nor the override are restored: {path} " in logged.text
    assert server.engines.loaded == AT_START
    save("c")
    await change(server, "POST", name="c")
    assert json.loads(path.read_bytes())["heads"] == {"c": "c"}


@pytest.mark.parametrize("content", [None, b"{}"])
async def test_nothing_to_restore_is_nothing_to_log(restart, folder, logged, content):
    if content is not None:
        (folder / LOADED_FILE).write_bytes(content)
    server = await restart()
    assert server.engines.loaded == AT_START and "restored" not in logged.text


async def test_what_can_no_longer_be_loaded_is_logged_and_the_rest_restored(
    setup, save, folder, restart, logged
):
    server = await setup()
    for name in ("c", "d", "e"):
        save(name)
        await change(server, "POST", name=name)
    await change(server, "PATCH", "/a", canary={"head": "c", "percent": 10})
    await change(server, "PATCH", "/c", default=True)
    kept = folder.parent / "kept"
    (folder / "c").rename(kept)
    (folder / "d" / "head.safetensors").write_bytes(b"\0" * 8)
    server = await restart()
    assert [head.name for head in server.registry] == ["a", "b", "e"]
    assert server.registry.default == "a" and not server.registry.canaries
    for name in ("c", "d", "a"):
        assert f"Head {name} is not restored: " in logged.text
    # Its disk may have been away: the next start tries again.
    kept.rename(folder / "c")
    server = await restart()
    assert [head.name for head in server.registry] == ["a", "b", "c", "e"]
    assert server.registry.default == "c" and server.registry.canaries["a"].name == "c"


async def test_a_file_of_hostile_names_reaches_nothing(restart, folder, save, logged):
    save("../outside")
    heads = {"../x": "a", "entropy": "a", "c": "../outside", "d": "/etc", "e\n": "a", "f": "x\0"}
    loaded = {"heads": heads, "canaries": {"a": ["a", 5], "x": ["a", 5]}, "default": "x"}
    (folder / LOADED_FILE).write_text(json.dumps(loaded))
    server = await restart()
    assert server.engines.loaded == AT_START
    assert server.registry.default == "a" and not server.registry.canaries
    assert logged.text.count("is not restored") == len(heads) + 3


async def test_a_change_stands_where_it_cannot_be_written_down(setup, save, folder, logged):
    server = await setup()
    save("c")
    (folder / LOADED_FILE).mkdir()
    await change(server, "POST", name="c")
    assert choose(server.registry, head="c")[0].generation == 1
    assert "will not survive a restart" in logged.text


async def test_a_server_restores_heads_before_it_answers(setup, save, folder, monkeypatch):
    await change(await setup(), "POST", name="c", folder=save("c").name)
    server = await setup()
    config = server.engines.vllm_config
    parallel = {"_api_process_count": 1, "enable_elastic_ep": False, "worker_cls": ""}
    config.parallel_config = SimpleNamespace(**parallel)
    config.scheduler_config = SimpleNamespace(scheduler_cls="")
    settings = {"heads": {"a": str(folder / "a")}, "heads_dir": str(folder)}
    config.additional_config = {"adaptive": settings}
    server.engines.renderer = None
    monkeypatch.setenv("ADAPTIVE_ADMIN_KEY", control.KEY)
    for name in (
        "require_engine_side",
        "refuse_unsupported",
        "watch_engine",
        "forget_unsent",
    ):
        monkeypatch.setattr(f"server.plugin.{name}", lambda *_: None)
    monkeypatch.setattr("server.plugin.check_grammars_in_threads", AsyncMock())
    monkeypatch.setattr("server.plugin.HANDLERS", {})
    make = control.AdaptiveMetrics
    monkeypatch.setattr(
        "server.plugin.AdaptiveMetrics", lambda *args: make(*args, CollectorRegistry())
    )
    paths = [BaseModelPath("smol", "smol")]
    models = SimpleNamespace(base_model_paths=paths)
    state = SimpleNamespace(openai_serving_models=models, queue=Queue(), application=server.app)
    await AdaptiveEndpoints().init_state(server.engines, state, None)
    assert [head.name for head in state.adaptive.heads] == ["a", "c"]


HALF = "\ud800"


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": {"name": HALF}},
        {"base_model": {"name": "x" * 129}},
        {"created": HALF},
        {"packages": {HALF: "1"}},
        {"training": {"note": HALF}},
        {"level": HALF},
        {HALF: 1},
    ],
)
async def test_a_head_that_cannot_be_shown_is_refused_and_the_others_are_shown(
    setup, save, changes
):
    server = await setup()
    path = save("c") / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    response = await server.send("POST", body={"name": "a", "folder": "c"})
    assert_refused(response, 400, "folder")
    await control.assert_unchanged(server, "load", "refused")
    listed = (await server.send("GET", key=None)).json()["data"]
    assert [head["id"] for head in listed] == ["a", "b"]
    assert b'adaptive_head_info{base_model="tiny"' in generate_latest(server.metrics)


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "../../outside"])
async def test_files_that_lead_elsewhere_are_refused_and_hold_nothing_up(
    setup, save, folder, name, target
):
    server = await setup()
    save("../outside")
    path = save("c") / name
    path.unlink()
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(f"{target}/{name}" if target.endswith("outside") else target)
    async with asyncio.timeout(60):
        response = await server.send("POST", body={"name": "c"})
        assert_refused(response, 400, "folder", "cannot be read: it is ")
        save("d")
        await change(server, "POST", name="d")


@contextmanager
def stuck(owner, name):
    """Let a method wait as for a disk that does not answer, and all others give up soon."""
    answered = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.head_control.MAX_LOADING_S", 0.1)
        patch.setattr(owner, name, lambda *_: answered.wait(60))
        try:
            yield
        finally:
            answered.set()


async def test_a_disk_that_does_not_answer_ends_the_attempt(setup, save):
    server = await setup()
    save("c")
    with stuck(server.app.state.adaptive.control._verifier, "load"):
        response = await server.send("POST", body={"name": "c"})
        assert_refused(response, 500, None, "has not answered within 0.1 s")
        await control.assert_unchanged(server, "load", "failed")
        await change(server, "PATCH", "/b", default=True)


async def test_a_disk_that_takes_no_file_does_not_hold_up_other_changes(setup, logged):
    server = await setup()
    with stuck(server.app.state.adaptive.control._library, "write_loaded"):
        for name in "ba":
            await change(server, "PATCH", f"/{name}", default=True)
    assert server.registry.default == "a"
    assert logged.text.count("will not survive a restart: --heads-dir has not answered") == 2


async def test_a_write_that_is_late_replaces_no_newer_one(setup, folder, monkeypatch):
    server = await setup()
    library = server.app.state.adaptive.control._library
    answered, written, write = threading.Event(), [], library.write_loaded

    def write_late(loaded):
        if loaded.default == "b":
            assert answered.wait(60)
        write(loaded)
        written.append(loaded.default)

    monkeypatch.setattr("server.head_control.MAX_LOADING_S", 0.1)
    monkeypatch.setattr(library, "write_loaded", write_late)
    for name in "ba":
        await change(server, "PATCH", f"/{name}", default=True)
    answered.set()
    await wait_until(lambda: len(written) == 2)
    assert json.loads((folder / LOADED_FILE).read_bytes())["default"] == "a"


async def test_a_disk_that_does_not_answer_does_not_hold_up_the_start(setup, logged):
    server = await setup()
    with stuck(server.app.state.adaptive.control._library, "read_loaded"):
        await server.app.state.adaptive.control.restore()
    assert "are restored: --heads-dir has not answered" in logged.text


async def test_training_is_shown_by_a_route_of_its_own(setup, save):
    server = await setup()
    path = save("c") / "head.json"
    training = {"losses": [0.5, float("nan")], "note": "ü"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training": training}))
    await change(server, "POST", name="c")
    assert all("training" not in head for head in (await server.send("GET")).json()["data"])
    shown = await server.send("GET", "/c/training", key=None)
    assert shown.json() == {"training": {"losses": [0.5, None], "note": "ü"}}
    assert (await server.send("GET", "/a/training")).json() == {"training": None}
    assert_refused(await server.send("GET", "/x/training"), 404, None, "loaded: a, b, c")


@pytest.mark.parametrize("is_replaced", [True, False], ids=["replaced", "removed"])
async def test_the_series_of_a_head_that_is_gone_leave_the_metrics(
    setup, save, monkeypatch, is_replaced
):
    monkeypatch.setattr("server.head_control.SERIES_KEPT_S", 0.0)
    server = await setup()
    _, head = choose(server.registry, head="b")
    head.num_holders += 1
    if is_replaced:
        save("c", level="sequence")
        await change(server, "POST", name="b", folder="c")
    else:
        await change(server, "DELETE", "/b")
    old = b'head="b",level="token"'
    await asyncio.sleep(5 * control.INTERVAL_S)
    assert old in generate_latest(server.metrics), "a request of it is still counted"
    head.num_holders -= 1
    await wait_until(lambda: old not in generate_latest(server.metrics))
    shown = generate_latest(server.metrics)
    assert (b'head="b",level="sequence"' in shown) == is_replaced
    assert b'head="a",level="token"' in shown


async def test_a_head_that_comes_back_in_time_keeps_its_series(setup, save, monkeypatch):
    monkeypatch.setattr("server.head_control.SERIES_KEPT_S", 0.0)
    server = await setup()
    server.app.state.adaptive.metrics.count_request(choose(server.registry, head="b")[0])
    await change(server, "POST", name="b", folder=save("b-2").name)
    await wait_until(lambda: server.engines.loaded == [{("a", 0), ("b", 1)}] * 4)
    await settle()
    assert control.sample(server.metrics, "adaptive_requests_total", head="b") == 1
