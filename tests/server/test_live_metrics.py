"""What /metrics says after requests whose tokens are known."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.conftest import MODEL

pytestmark = pytest.mark.engine

COUNT = "adaptive_temperature_count"
ANSWERS = "adaptive_request_temperature_count"
REQUESTS = "adaptive_requests_total"


def make_body(**options) -> dict:
    body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 10, "ignore_eos": True}
    return body | {"temperature": "adaptive"} | options


@pytest.fixture
def rise(server):
    """By how much metrics have risen since the test began."""
    before = {name: server.sum_metric(name) for name in (COUNT, ANSWERS, REQUESTS)}
    return lambda name: server.sum_metric(name) - before[name]


def complete(server, **options) -> int:
    """Ask; returns how many tokens were generated."""
    response = server.post("/v1/completions", make_body(**options))
    assert response.is_success, response.text
    return response.json()["usage"]["completion_tokens"]


def test_every_token_of_adaptive_requests_is_counted_once(server, rise):
    report = {"report": "tokens"}
    num_tokens = [
        complete(server),
        complete(server, n=3, adaptive=report),
        complete(server, prompt=["a", "b"], adaptive={"head": "seq", "report": "none"}),
        complete(server, max_tokens=70, adaptive={"policy": "entropy"}),
        complete(server, stop=[" time"], ignore_eos=False),
    ]
    assert rise(COUNT) == sum(num_tokens)
    assert rise(ANSWERS) == 8
    assert rise(REQUESTS) == 6


def test_streams_and_crowds_are_counted_too(server, client, rise):
    body = make_body(stream=True, stream_options={"include_usage": True})
    del body["ignore_eos"]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(complete, server, max_tokens=4 + number) for number in range(8)]
        *_, last = client.completions.create(**body)
        num_tokens = [future.result() for future in asked]
    assert rise(COUNT) == sum(num_tokens) + last.usage.completion_tokens
    assert rise(REQUESTS) == 9


def test_ordinary_requests_count_for_nothing(server, rise):
    assert complete(server, temperature=0.7, n=2) == 20
    assert complete(server, temperature=0) == 10
    assert rise(COUNT) == rise(ANSWERS) == rise(REQUESTS) == 0


def test_labels_say_which_head_chose(server):
    def count(**labels):
        return server.sum_metric(COUNT, model=MODEL, **labels)

    before = count(head="seq", level="sequence"), count(head="tok", level="token")
    num_tokens = complete(server, adaptive={"head": "seq"})
    after = count(head="seq", level="sequence"), count(head="tok", level="token")
    assert after == (before[0] + num_tokens, before[1])
    assert server.sum_metric("adaptive_head_info") == 2


def test_a_client_that_leaves_ends_its_stream_and_its_tokens_are_counted(server, client, rise):
    stream = client.completions.create(
        model=MODEL,
        prompt="Once upon",
        temperature="adaptive",
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True, "adaptive": {"report": "tokens"}},
    )
    chunks = (chunk for chunk in stream if chunk.choices)
    num_read = sum(
        len(next(chunks).choices[0].model_extra["adaptive"]["temperatures"]) for _ in range(5)
    )
    assert server.sum_metric("vllm:num_requests_running") == 1
    stream.close()
    server.wait_until_idle()
    assert num_read <= rise(COUNT) < 1500
    assert rise(ANSWERS) in (0, 1)
    assert server.sum_metric("adaptive_temperature_bucket", le="+Inf") == server.sum_metric(COUNT)


def test_a_client_that_waits_no_longer_ends_its_request(server, rise):
    with ThreadPoolExecutor(1) as pool, server.connect() as connection:
        connection.timeout = 1.5
        body = make_body(max_tokens=1500)
        asked = pool.submit(connection.post, "/v1/completions", json=body)
        assert isinstance(asked.exception(), httpx.ReadTimeout)
    server.wait_until_idle()
    assert rise(REQUESTS) == 1
    assert rise(COUNT) < 1500
    assert complete(server) == 10
