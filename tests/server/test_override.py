"""The switch that gives every adaptive request one constant, through the routes."""

import asyncio
import json
import threading

import pytest

from adaptive_head.library import LOADED_FILE
from adaptive_head.operator_policy import make_constant, read_policy
from server.override_routes import OVERRIDE_PATH
from tests.server import test_head_control as control
from tests.server.fakes import sample
from tests.server.test_head_control import KEY, assert_refused, choose

folder, save, setup = control.folder, control.save, control.setup


@pytest.fixture
def send():
    """Ask for the override."""

    async def send(server, method, body=None, key=KEY):
        return await server.send(method, body=body, key=key, root=OVERRIDE_PATH)

    return send


def show(response):
    assert response.status_code == 200, response.text
    assert response.json()["object"] == "adaptive.override"
    return response.json()["temperature"]


async def test_the_override_is_switched_on_changed_and_switched_off(setup, send):
    server = await setup()
    assert show(await send(server, "GET", key=None)) is None
    assert sample(server.metrics, "adaptive_override", model="smol") == 0
    before = choose(server.registry, head="b")
    for temperature in (0.6, 0.0, 1):
        assert show(await send(server, "PUT", {"temperature": temperature})) == temperature
        assert show(await send(server, "GET", key=None)) == temperature
        assert choose(server.registry, head="b") == (make_constant(temperature), None)
        assert sample(server.metrics, "adaptive_override", model="smol") == 1
    for _ in range(2):
        assert show(await send(server, "DELETE")) is None
        assert choose(server.registry, head="b") == before
        assert sample(server.metrics, "adaptive_override", model="smol") == 0
    changes = "adaptive_head_changes_total"
    assert sample(server.metrics, changes, action="override", result="done") == 5


async def test_the_list_of_heads_shows_what_the_operator_decides(setup, send):
    policy = read_policy({"policy": "entropy", "max": 0.7})
    server = await setup(policy=policy, max_temperature=0.9)
    await send(server, "PUT", {"temperature": 0.6})
    listed = (await server.send("GET", key=None)).json()
    assert listed["policy"] == {"policy": "entropy", "max": 0.7, "scale": 1, "report": "summary"}
    assert (listed["max"], listed["override"]) == (0.9, 0.6)
    plain = (await (await setup()).send("GET")).json()
    assert plain["policy"]["policy"] == "head"
    assert plain["max"] is plain["override"] is None


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        [],
        {"temperature": None},
        {"temperature": "0.6"},
        {"temperature": True},
        {"temperature": -0.1},
        {"temperature": 10.1},
        {"temperature": 0.6, "head": "a"},
    ],
)
async def test_another_body_is_a_400_and_changes_nothing(setup, send, body):
    server = await setup()
    assert (await send(server, "PUT", body)).status_code == 400
    assert server.registry.override is None


async def test_an_override_is_not_above_the_highest_temperature(setup, send):
    server = await setup(max_temperature=0.5)
    response = await send(server, "PUT", {"temperature": 0.6})
    assert_refused(response, 400, "temperature", "at most 0.5 (--adaptive-max", "got 0.6")
    assert server.registry.override is None
    changes = "adaptive_head_changes_total"
    assert sample(server.metrics, changes, action="override", result="refused") == 1
    assert show(await send(server, "PUT", {"temperature": 0.5})) == 0.5


@pytest.mark.parametrize("key", [None, "", KEY[:-1]])
async def test_the_wrong_key_switches_nothing(setup, send, key):
    server = await setup()
    await send(server, "PUT", {"temperature": 0.6})
    for method, body in (("PUT", {"temperature": 0.9}), ("DELETE", None)):
        assert_refused(await send(server, method, body, key), 401, None, "X-Admin-Key")
    assert server.registry.override_temperature == 0.6


async def test_without_control_there_is_no_switch(setup, send):
    server = await setup(key=None)
    response = await send(server, "PUT", {"temperature": 0.6})
    assert_refused(response, 403, None, "ADAPTIVE_ADMIN_KEY", "--heads-dir")
    assert show(await send(server, "GET")) is None


async def test_the_override_does_not_wait_for_a_head_that_is_loading(setup, save, send):
    server = await setup()
    save("c")
    verifier = server.app.state.adaptive.control._verifier
    begun, may_end, load = threading.Event(), threading.Event(), verifier.load

    def wait(*args):
        begun.set()
        assert may_end.wait(60)
        return load(*args)

    verifier.load = wait
    loading = asyncio.create_task(server.send("POST", body={"name": "c"}))
    try:
        assert await asyncio.to_thread(begun.wait, 60)
        async with asyncio.timeout(30):
            assert show(await send(server, "PUT", {"temperature": 0.6})) == 0.6
        assert not loading.done()
    finally:
        may_end.set()
    assert (await loading).status_code == 200
    written = json.loads((server.folder / LOADED_FILE).read_bytes())
    assert (written["heads"], written["override"]) == ({"c": "c"}, 0.6)


@pytest.mark.parametrize(("highest", "expected"), [(None, 0.6), (0.5, 0.5), (0.0, 0.0)])
async def test_the_override_survives_a_restart_below_the_highest_temperature(
    setup, send, highest, expected
):
    await send(await setup(), "PUT", {"temperature": 0.6})
    server = await setup(max_temperature=highest)
    await server.app.state.adaptive.control.restore()
    assert server.registry.override_temperature == expected
    assert sample(server.metrics, "adaptive_override") == 1
    await send(server, "DELETE")
    server = await setup()
    await server.app.state.adaptive.control.restore()
    assert server.registry.override is None


async def test_a_switch_at_once_is_written_as_it_was_last(setup, send):
    server = await setup()
    bodies = [{"temperature": number / 10} for number in range(1, 9)]
    await asyncio.gather(*[send(server, "PUT", body) for body in bodies])
    written = json.loads((server.folder / LOADED_FILE).read_bytes())
    assert written["override"] == server.registry.override_temperature


async def test_an_impossible_override_in_the_file_is_damage(setup, folder):
    (folder / LOADED_FILE).parent.mkdir(exist_ok=True)
    (folder / LOADED_FILE).write_text('{"override": 11}')
    server = await setup()
    await server.app.state.adaptive.control.restore()
    assert server.registry.override is None
