"""Heads that come and go in a running server."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from adaptive_head import HeadConfig, load_head
from adaptive_head.checkpoint import read_metadata, write_metadata
from adaptive_head.lpo.probing import make_probe, read_probe_states
from server.admin_key import ADMIN_KEY_HEADER
from server.head_routes import HEADS_PATH
from tests.heads import save_strong_head
from tests.server.conftest import ADMIN_KEY, HIDDEN_SIZE, MODEL, TEMPERATURES

pytestmark = pytest.mark.engine

COUNT = "adaptive_temperature_count"
# Temperatures that no other head of these tests has tell which head has chosen.
OLD, NEW = (0.11, 0.51, 0.91), (0.12, 0.52, 1.12)


@pytest.fixture(scope="module")
def folder(heads, model):
    """The server's folder of heads, with two versions of one more and a bad one."""
    folder = heads["tok"].parent
    for name, temperatures in [("late-1", OLD), ("late-2", NEW)]:
        config = HeadConfig(HIDDEN_SIZE, temperatures, (64, 64))
        save_strong_head(folder / name, model, config, "token", 3)
    bad = save_strong_head(folder / "bad", model, config, "token", 4) / "head.safetensors"
    bad.write_bytes(bad.read_bytes()[:1000])
    return folder


@pytest.fixture
def change(server, folder):
    """Sends a change with the admin key. What it has loaded is removed at the end."""

    def send(method, path="", **body):
        headers = {ADMIN_KEY_HEADER: ADMIN_KEY}
        return server.http.request(method, HEADS_PATH + path, json=body, headers=headers)

    yield send
    for head in server.get(HEADS_PATH).json()["data"]:
        send("PATCH", f"/{head['id']}", canary=None)
    for head in server.get(HEADS_PATH).json()["data"]:
        if head["id"] not in ("tok", "seq"):
            assert send("DELETE", f"/{head['id']}").is_success


def make_body(**options) -> dict:
    body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 10, "ignore_eos": True}
    return body | {"temperature": "adaptive", "adaptive": {"report": "tokens"}} | options


def complete(server, **adaptive) -> dict:
    """Ask; what the answer says of its temperatures."""
    body = make_body(adaptive={"report": "tokens"} | adaptive)
    response = server.post("/v1/completions", body)
    assert response.is_success, response.text
    return response.json()["choices"][0]["adaptive"]


def test_a_head_is_loaded_used_counted_and_removed(server, change):
    assert change("POST", name="late", folder="late-1").is_success
    answer = complete(server, head="late")
    assert answer["head"] == "late" and set(answer["temperatures"]) <= set(OLD)
    assert server.sum_metric(COUNT, head="late") == 10
    assert server.sum_metric("adaptive_temperature_bucket", head="late", le="0.91") == 10
    assert server.sum_metric("adaptive_head_info", head="late", temperatures="0.11 0.51 0.91") == 1
    assert change("DELETE", "/late").is_success
    response = server.post("/v1/completions", make_body(adaptive={"head": "late"}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "adaptive.head"
    assert server.sum_metric("adaptive_head_info") == 2


def read_temperatures(lines) -> list[float]:
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [value for choice in choices for value in choice["adaptive"]["temperatures"]]


def test_streams_keep_the_head_that_they_began_with(server, change):
    change("POST", name="late", folder="late-1")
    body = make_body(stream=True, max_tokens=120, adaptive={"head": "late", "report": "tokens"})
    with (
        server.connect() as connection,
        connection.stream("POST", "/v1/completions", json=body) as stream,
    ):
        lines = stream.iter_lines()
        first = [next(lines)]
        replaced = change("POST", name="late", folder="late-2").json()
        assert set(complete(server, head="late")["temperatures"]) <= set(NEW)
        removed = change("DELETE", "/late")
        rest = list(lines)
    temperatures = read_temperatures([*first, *rest])
    assert replaced["generation"] > 0 and removed.is_success
    assert len(temperatures) == 120 and set(temperatures) <= set(OLD)
    assert rest[-2:] == ["data: [DONE]", ""]


def test_under_load_a_bad_head_changes_nothing_and_a_good_one_reaches_the_next_request(
    server, change
):
    change("POST", name="late", folder="late-1")
    with ThreadPoolExecutor(8) as pool:
        before = [pool.submit(complete, server, head="late") for _ in range(8)]
        for options in ({"folder": "bad"}, {"folder": "../heads"}, {"folder": "/"}):
            refused = change("POST", name="late", **options)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "folder")
        loaded = change("POST", name="late", folder="late-2")
        after = [pool.submit(complete, server, head="late") for _ in range(8)]
        others = complete(server)
    assert loaded.is_success
    for future in before:
        temperatures = set(future.result()["temperatures"])
        assert temperatures <= set(OLD) or temperatures <= set(NEW), "never of both"
    assert all(set(future.result()["temperatures"]) <= set(NEW) for future in after)
    assert set(others["temperatures"]) <= set(TEMPERATURES)


def test_a_head_must_make_of_the_served_model_what_its_probe_says(server, change, folder, model):
    """Probes by transformers' model, in float32, against the served one."""
    states = read_probe_states(model)
    probe = make_probe(load_head(folder / "late-1").network, states)
    assert max(probe.temperatures) - min(probe.temperatures) > 0.1
    for name, temperatures in [
        ("right", probe.temperatures),
        ("wrong", tuple(reversed(probe.temperatures))),
    ]:
        head = shutil.copytree(folder / "late-1", folder / name, dirs_exist_ok=True)
        claimed = probe.model_copy(update={"temperatures": temperatures})
        described = read_metadata(head).model_copy(update={"probe": claimed})
        write_metadata(head, described)
    before = server.sum_metric("adaptive_requests_total")
    refused = change("POST", name="late", folder="wrong")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "folder")
    assert "its feature probe does not fit" in refused.json()["error"]["message"]
    assert change("POST", name="late", folder="right").is_success
    assert server.sum_metric("adaptive_requests_total") == before, "probes are not counted"
    assert set(complete(server, head="late")["temperatures"]) <= set(OLD)


def test_a_canary_answers_its_share_and_both_are_in_the_metrics(server, change):
    change("POST", name="late", folder="late-1")
    assert change("PATCH", "/tok", canary={"head": "late", "percent": 50}).is_success
    requests = "adaptive_requests_total"
    before = {name: server.sum_metric(requests, head=name) for name in ("tok", "late")}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(server, head="tok")["head"], range(24)))
    # The chance that one of them gets less is below 1 in 1,000,000.
    assert min(answers.count("tok"), answers.count("late")) >= 1
    for name in before:
        rise = server.sum_metric(requests, head=name) - before[name]
        assert rise == answers.count(name)
    assert server.sum_metric("adaptive_canary_share", head="tok", canary="late") == 0.5


def test_without_the_key_nothing_changes(server, folder):
    for headers in ({}, {ADMIN_KEY_HEADER: "wrong"}):
        response = server.http.post(HEADS_PATH, json={"name": "late-1"}, headers=headers)
        assert response.status_code == 401
    assert [head["id"] for head in server.get(HEADS_PATH).json()["data"]] == ["tok", "seq"]
