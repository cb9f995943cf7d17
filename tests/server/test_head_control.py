"""Changing heads through the routes, with real selectors in the place of the workers' engines."""

import asyncio
import dataclasses
from types import SimpleNamespace

import httpx
import pytest
import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from adaptive_head import AdaptiveHead, HeadConfig, TemperatureSelector, load_head, save_head
from adaptive_head.checkpoint import BaseModelIdentity, HeadError
from adaptive_head.options import parse_request, resolve_options
from adaptive_head.slots import PolicyIndex
from adaptive_head.vllm.heads import HeadLoader
from adaptive_head.vllm.limits import Limits
from adaptive_head.vllm.worker import AdaptiveWorker
from server.admin_key import ADMIN_KEY_HEADER, MAX_DELAYED, AdminKey
from server.head_control import HeadControl
from server.head_routes import HEADS_PATH, make_head_router
from server.heads import HeadRegistry
from server.metrics import AdaptiveMetrics
from server.override_routes import make_override_router
from tests.programs import HANG_S
from tests.server.fakes import make_report, make_state, sample

KEY = "open-sesame-please"
FINGERPRINT = "0123456789abcdef"
HIDDEN_SIZE = 8
# Between two looks whether a head is free.
INTERVAL_S = 0.02


class Worker:
    """Of a worker only what changes heads; the methods are those of ours."""

    add_head = AdaptiveWorker.add_head
    remove_head = AdaptiveWorker.remove_head

    def __init__(self, config, heads) -> None:
        self._loader = HeadLoader(config)
        networks = {name: load_head(folder).network for name, folder in heads.items()}
        self.selector = TemperatureSelector(networks, 1, torch.device("cpu"))
        self.model_runner = SimpleNamespace(selector=self.selector)


class Engines:
    """Two data-parallel engines of two workers each."""

    def __init__(self, config, heads) -> None:
        self.vllm_config = config
        self.engine_core = self
        self.workers = [[Worker(config, heads) for _ in range(2)] for _ in range(2)]

    async def call_utility_all_async(self, utility, method, timeout, args, kwargs):
        assert utility == "collective_rpc" and timeout is None and kwargs is None
        await asyncio.sleep(0)
        return [[getattr(worker, method)(*args) for worker in engine] for engine in self.workers]

    @property
    def num_policies(self) -> list[int]:
        return [len(worker.selector._policies) for engine in self.workers for worker in engine]

    @property
    def loaded(self) -> list[set[tuple[str, int]]]:
        return [
            {key[1:] for key in worker.selector._index if key[0] == "head"}
            for engine in self.workers
            for worker in engine
        ]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "heads"


@pytest.fixture
def save(folder):
    def save(name, seed=0, hidden_size=HIDDEN_SIZE, fingerprint=FINGERPRINT, level="token"):
        network = AdaptiveHead(HeadConfig(hidden_size, (0.0, 0.5), (4,)), seed)
        identity = BaseModelIdentity(name="tiny", fingerprint=fingerprint)
        save_head(folder / name, network, level=level, base_model=identity, trained=False)
        return folder / name

    return save


@pytest.fixture
def setup(monkeypatch, save, folder):
    """The application, its engines and its metrics; heads `a` (the default) and `b` are loaded."""
    monkeypatch.setattr("adaptive_head.vllm.heads.fingerprint_served", lambda _: FINGERPRINT)
    monkeypatch.setattr("server.head_control.RELEASE_INTERVAL_S", INTERVAL_S)
    monkeypatch.setattr("server.admin_key.DELAY_S", 0.0)
    monkeypatch.setattr("adaptive_head.vllm.heads.gather_states", lambda state: [state])
    model_config = SimpleNamespace(get_hidden_size=lambda: HIDDEN_SIZE, model="tiny")
    config = SimpleNamespace(model_config=model_config, additional_config={})
    heads = {name: save(name) for name in "ab"}

    async def make(key=KEY, max_temperature=None, **decided):
        metadata = {name: load_head(path).metadata for name, path in heads.items()}
        collected = CollectorRegistry()
        metrics = AdaptiveMetrics("smol", metadata, collected)
        registry = HeadRegistry(metadata, "a")
        engines = Engines(config, heads)
        control = None
        if key:
            control = HeadControl(engines, registry, metrics, folder, key, max_temperature)
        app = FastAPI()
        app.include_router(make_head_router())
        app.include_router(make_override_router())
        app.add_middleware(AdminKey, limits=Limits())
        init_exception_handler(app)
        app.state.args = SimpleNamespace(log_error_stack=False)
        state = make_state(
            metrics=metrics, control=control, max_temperature=max_temperature, **decided
        )
        app.state.adaptive = dataclasses.replace(state, heads=registry)
        return SimpleNamespace(
            app=app,
            engines=engines,
            folder=folder,
            metrics=collected,
            registry=registry,
            send=make_sender(app),
        )

    return make


def make_sender(app):
    transport = httpx.ASGITransport(app)

    async def send(method, path="", body=None, key=KEY, root=HEADS_PATH):
        headers = {} if key is None else {ADMIN_KEY_HEADER: key}
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, root + path, json=body, headers=headers)

    return send


async def settle() -> None:
    """Let what was scheduled happen."""
    for _ in range(10):
        await asyncio.sleep(0)


async def wait_until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(INTERVAL_S)


def choose(registry, **adaptive):
    request = parse_request(adaptive)
    options = resolve_options(request, registry.by_name, registry.default)
    return registry.choose(options, request, None)


AT_START = [{("a", 0), ("b", 0)}] * 4


@pytest.mark.parametrize(
    ("error", "status"),
    [(HeadError("its feature probe does not fit"), 400), (TimeoutError("no answer"), 500)],
)
async def test_a_head_that_its_probe_refuses_leaves_the_workers_again(
    setup, save, monkeypatch, error, status
):
    """The old generation of its name serves on, and nothing else has changed."""
    asked = []

    async def refuse(_engine_client, head):
        asked.append((head.name, head.generation, head.level))
        assert server.engines.loaded == [{("a", 0), ("b", 0), ("b", 1)}] * 4
        raise error

    monkeypatch.setattr("server.head_control.check_features", refuse)
    server = await setup()
    save("c", level="sequence")
    before = server.registry.by_name["b"]
    response = await server.send("POST", body={"name": "b", "folder": "c"})
    assert response.status_code == status and str(error) in response.text
    await settle()
    assert asked == [("b", 1, "sequence")]
    assert server.engines.loaded == AT_START
    assert server.registry.by_name["b"] is before


async def test_a_head_is_loaded_by_every_worker_and_then_served(setup, save):
    server = await setup()
    save("c", level="sequence")
    response = await server.send("POST", body={"name": "c"})
    assert response.status_code == 200, response.text
    shown = response.json()
    assert (shown["id"], shown["generation"], shown["level"]) == ("c", 1, "sequence")
    assert not shown["default"] and shown["canary"] is None
    assert server.engines.loaded == [{("a", 0), ("b", 0), ("c", 1)}] * 4
    assert server.engines.num_policies == [PolicyIndex.FIRST_HEAD + 3] * 4, (
        "a worker that has it loads it once more"
    )
    assert choose(server.registry, head="c")[0].generation == 1
    assert sample(server.metrics, "adaptive_head_info", head="c", level="sequence") == 1
    changes = "adaptive_head_changes_total"
    assert sample(server.metrics, changes, action="load", result="done") == 1
    listed = (await server.send("GET", key=None)).json()["data"]
    assert [head["id"] for head in listed] == ["a", "b", "c"]


@pytest.mark.parametrize("is_replaced", [True, False], ids=["replaced", "removed"])
async def test_a_head_stays_in_the_workers_until_its_last_request_is_over(setup, save, is_replaced):
    server = await setup()
    save("b-2", seed=1)
    _, head = choose(server.registry, head="b")
    first, second = (make_report(head=head) for _ in range(2))
    first.hold()
    second.hold()
    if is_replaced:
        response = await server.send("POST", body={"name": "b", "folder": "b-2"})
        assert response.json()["generation"] == 1
        assert choose(server.registry, head="b")[0].generation == 1
    else:
        assert (await server.send("DELETE", "/b")).json()["deleted"]
    first.release()
    await asyncio.sleep(5 * INTERVAL_S)
    assert all(("b", 0) in loaded for loaded in server.engines.loaded)
    second.release()
    rest = {("a", 0), ("b", 1)} if is_replaced else {("a", 0)}
    await wait_until(lambda: server.engines.loaded == [rest] * 4)
    assert sample(server.metrics, "adaptive_head_info", head="b") == is_replaced


async def test_a_head_that_is_held_again_a_moment_later_stays(setup):
    """As that of a background response, whose route has let go before it begins."""
    server = await setup()
    report = make_report(head=choose(server.registry, head="b")[1])
    report.hold()
    await server.send("DELETE", "/b")
    report.release()
    await settle()
    report.hold()
    await asyncio.sleep(5 * INTERVAL_S)
    assert ("b", 0) in server.engines.loaded[0]


async def test_a_removed_head_leaves_the_workers(setup):
    server = await setup()
    assert (await server.send("DELETE", "/b")).json()["deleted"]
    await wait_until(lambda: server.engines.loaded == [{("a", 0)}] * 4)
    assert sample(server.metrics, "adaptive_head_info") == 1
    assert (await server.send("DELETE", "/b")).status_code == 404


def half_write(path):
    weights = path / "head.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])


def forget_metadata(path):
    (path / "head.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(half_write, "damaged or truncated"), (forget_metadata, "it has no head.json")],
)
async def test_a_half_written_head_changes_nothing(setup, save, damage, reason):
    server = await setup()
    damage(save("bad"))
    response = await server.send("POST", body={"name": "a", "folder": "bad"})
    assert_refused(response, 400, "folder", reason)
    await assert_unchanged(server, "load", "refused")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"hidden_size": 16}, "width 16"), ({"fingerprint": "f" * 16}, "fingerprint ffff")],
)
async def test_a_head_for_another_model_changes_nothing(setup, save, fields, reason):
    server = await setup()
    save("foreign", **fields)
    response = await server.send("POST", body={"name": "a", "folder": "foreign"})
    assert_refused(response, 400, "folder", reason)
    await assert_unchanged(server, "load", "refused")


async def test_a_head_that_one_worker_cannot_load_changes_nothing(setup, save, monkeypatch):
    server = await setup()
    save("c")
    last = server.engines.workers[1][1]
    monkeypatch.setattr(last.selector, "add_head", lambda *_: 1 / 0)
    response = await server.send("POST", body={"name": "c"})
    assert_refused(response, 500, None, "division by zero")
    await assert_unchanged(server, "load", "failed")


async def test_a_head_that_changes_while_it_is_loaded_changes_nothing(setup, save, monkeypatch):
    server = await setup()
    path = save("c")
    load, other = server.engines.call_utility_all_async, save("d", seed=5)

    async def exchange_first(*args):
        monkeypatch.setattr(server.engines, "call_utility_all_async", load)
        (other / "head.safetensors").replace(path / "head.safetensors")
        return await load(*args)

    monkeypatch.setattr(server.engines, "call_utility_all_async", exchange_first)
    response = await server.send("POST", body={"name": "c"})
    monkeypatch.undo()
    assert_refused(response, 500, None, "has changed")
    await settle()
    assert server.engines.loaded == AT_START


async def test_an_engine_that_is_gone_changes_nothing(setup, save, monkeypatch):
    server = await setup()
    save("c")

    async def fail(*_):
        raise RuntimeError("engine gone")

    monkeypatch.setattr(server.engines, "call_utility_all_async", fail)
    # In a server vLLM's own handler makes a 500 of it; without one it passes through here.
    with pytest.raises(RuntimeError, match="engine gone"):
        await server.send("POST", body={"name": "c"})
    monkeypatch.undo()
    await assert_unchanged(server, "load", "failed")


def assert_refused(response, status, param, *words) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    for word in words:
        assert word in error["message"]


async def assert_unchanged(server, action, result) -> None:
    await settle()
    assert server.engines.loaded == AT_START
    assert {head.name: head.generation for head in server.registry} == {"a": 0, "b": 0}
    assert server.registry.default == "a" and not server.registry.canaries
    assert sample(server.metrics, "adaptive_head_info") == 2
    changes = "adaptive_head_changes_total"
    assert sample(server.metrics, changes, action=action, result=result) == 1
    assert sample(server.metrics, changes) == 1


@pytest.mark.parametrize(
    "where",
    ["../outside", "/etc", ".", "a/..", "link", "x\0y", "x" * 5000, "missing", "a/head.json"],
)
async def test_nothing_is_read_outside_the_heads_folder(setup, save, folder, where):
    server = await setup()
    outside = save("../outside")
    (folder / "link").symlink_to(outside)
    response = await server.send("POST", body={"name": "c", "folder": where})
    assert_refused(response, 400, "folder")
    await assert_unchanged(server, "load", "refused")


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "", ".hidden", "entropy", "constant", "a b", "ä", "x" * 65, "a\n", "a="]
)
async def test_a_head_has_a_plain_name(setup, name):
    server = await setup()
    response = await server.send("POST", body={"name": name, "folder": "a"})
    assert_refused(response, 400, "name")
    await assert_unchanged(server, "load", "refused")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": 5},
        {"name": "c", "unknown": 1},
        {"name": "c", "default": "yes"},
        {"name": "c", "folder": ["a"]},
        [],
        None,
    ],
)
async def test_a_body_of_another_form_is_a_400(setup, body):
    server = await setup()
    assert (await server.send("POST", body=body)).status_code == 400
    assert server.engines.loaded == AT_START


@pytest.mark.parametrize("key", [None, "", KEY.title(), KEY + "x", KEY[:-1]])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "", {"name": "a"}),
        ("PATCH", "/b", {"default": True}),
        ("DELETE", "/b", None),
        ("DELETE", "/unknown", None),
    ],
)
async def test_the_wrong_key_changes_nothing_and_learns_nothing(setup, key, method, path, body):
    server = await setup()
    response = await server.send(method, path, body, key=key)
    assert_refused(response, 401, None, ADMIN_KEY_HEADER)
    assert KEY not in response.text
    changes = "adaptive_head_changes_total"
    assert sample(server.metrics, changes, action="key", result="refused") == 1
    assert server.registry.default == "a" and server.engines.loaded == AT_START


@pytest.mark.parametrize("key", [None, "", KEY])
async def test_control_is_off_without_a_key_of_the_servers(setup, key):
    server = await setup(key=None)
    response = await server.send("POST", body={"name": "a"}, key=key)
    assert_refused(response, 403, None, "ADAPTIVE_ADMIN_KEY", "--heads-dir")
    assert (await server.send("GET", key=None)).status_code == 200


async def test_the_right_key_does_not_wait_for_wrong_ones(setup, monkeypatch):
    monkeypatch.setattr("server.admin_key.DELAY_S", HANG_S)
    server = await setup()
    async with asyncio.timeout(HANG_S / 2):
        guesses = [
            asyncio.create_task(server.send("DELETE", "/b", key="wrong"))
            for _ in range(MAX_DELAYED)
        ]
        changes = "adaptive_head_changes_total"

        def count_refused() -> float:
            return sample(server.metrics, changes, action="key", result="refused") or 0

        await wait_until(lambda: count_refused() == MAX_DELAYED)
        assert (await server.send("PATCH", "/b", {"default": True})).is_success
        assert (await server.send("GET", key=None)).is_success
        # No room for another one to wait; it is counted as well.
        response = await server.send("DELETE", "/b", key="wrong")
        assert_refused(response, 429, None, ADMIN_KEY_HEADER)
        assert response.headers["retry-after"]
        assert count_refused() == MAX_DELAYED + 1
        assert not any(guess.done() for guess in guesses)
        for guess in guesses:
            guess.cancel()
        await asyncio.gather(*guesses, return_exceptions=True)
    monkeypatch.setattr("server.admin_key.DELAY_S", 0.0)
    # Those that left have made room.
    assert_refused(await server.send("DELETE", "/b", key="wrong"), 401, None, ADMIN_KEY_HEADER)


async def test_the_key_is_looked_at_before_the_body(setup):
    server = await setup()
    body = b"{" * 100
    for key, status in [("wrong", 401), (KEY, 400)]:
        headers = {ADMIN_KEY_HEADER: key, "content-type": "application/json"}
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            response = await client.post(HEADS_PATH, content=body, headers=headers)
        assert response.status_code == status


async def test_nothing_changes_where_nobody_looks_at_the_key(setup):
    server = await setup()
    server.app.user_middleware.clear()
    with pytest.raises(AttributeError, match="control"):
        await server.send("PATCH", "/b", {"default": True})
    assert server.registry.default == "a"


async def test_the_default_moves_and_cannot_be_removed(setup):
    server = await setup()
    assert_refused(await server.send("DELETE", "/a"), 409, None, "default")
    assert (await server.send("PATCH", "/b", {"default": True})).json()["default"]
    assert choose(server.registry)[0].name == "b"
    assert_refused(await server.send("PATCH", "/b", {"default": False}), 400, "default")
    assert_refused(await server.send("PATCH", "/x", {"default": True}), 404, None, "a, b")
    assert (await server.send("DELETE", "/a")).status_code == 200


async def test_a_change_is_whole_or_not_at_all(setup):
    server = await setup()
    change = {"default": True, "canary": {"head": "zz", "percent": 5}}
    assert_refused(await server.send("PATCH", "/b", change), 400, "canary.head", "(a)")
    assert server.registry.default == "a" and not server.registry.canaries
    assert_refused(await server.send("PATCH", "/nope", {}), 404, None, "a, b")


async def test_a_worker_that_never_finishes_reading_ends_the_attempt(setup, save, monkeypatch):
    monkeypatch.setattr("server.head_control.MAX_LOADING_S", 0.1)
    server = await setup()
    save("c")
    last = server.engines.workers[1][1]
    monkeypatch.setattr(last._loader, "poll", lambda *_: None)
    response = await server.send("POST", body={"name": "c"})
    assert_refused(response, 500, None, "within 0.1 s")
    await assert_unchanged(server, "load", "failed")
    assert (await server.send("PATCH", "/a", {"default": True})).status_code == 200


async def test_a_canary_is_set_shown_and_ended(setup):
    server = await setup()
    share = {"head": "b", "percent": 12.5}
    shown = (await server.send("PATCH", "/a", {"canary": share})).json()
    assert shown["canary"] == share
    assert sample(server.metrics, "adaptive_canary_share", head="a", canary="b") == 0.125
    assert_refused(await server.send("DELETE", "/b"), 409, None, "canary of head 'a'")
    assert (await server.send("PATCH", "/a", {})).json()["canary"] == share
    assert (await server.send("PATCH", "/a", {"canary": None})).json()["canary"] is None
    assert sample(server.metrics, "adaptive_canary_share") == 0
    assert (await server.send("DELETE", "/b")).status_code == 200


@pytest.mark.parametrize(
    ("canary", "param"),
    [
        ({"head": "a", "percent": 10}, "canary.head"),
        ({"head": "x", "percent": 10}, "canary.head"),
        ({"head": "b", "percent": 101}, "body.canary.percent"),
        ({"head": "b", "percent": -1}, "body.canary.percent"),
        ({"head": "b"}, "body.canary.percent"),
        ({"percent": 10}, "body.canary.head"),
    ],
)
async def test_a_canary_is_another_head_with_a_share(setup, canary, param):
    server = await setup()
    response = await server.send("PATCH", "/a", {"canary": canary})
    assert_refused(response, 400, param)
    assert not server.registry.canaries


async def test_a_share_of_nothing_ends_a_canary(setup):
    server = await setup()
    await server.send("PATCH", "/a", {"canary": {"head": "b", "percent": 10}})
    await server.send("PATCH", "/a", {"canary": {"head": "b", "percent": 0}})
    assert not server.registry.canaries
    assert sample(server.metrics, "adaptive_canary_share") == 0


async def test_changes_at_once_come_one_after_the_other(setup, save):
    server = await setup()
    for number in range(5):
        save(f"c{number}", seed=number)
    bodies = [{"name": "a", "folder": f"c{number}"} for number in range(5)]
    responses = await asyncio.gather(*[server.send("POST", body=body) for body in bodies])
    assert sorted(response.json()["generation"] for response in responses) == [1, 2, 3, 4, 5]
    last = server.registry.by_name["a"].generation
    await wait_until(lambda: server.engines.loaded == [{("a", last), ("b", 0)}] * 4)


async def test_the_first_head_of_a_server_without_heads_is_its_default(setup, save):
    server = await setup()
    server.registry._heads = {}
    server.registry.default = None
    save("c")
    assert (await server.send("POST", body={"name": "c"})).json()["default"]
