from collections import Counter

import pytest

from adaptive_head.abstention import Abstention
from adaptive_head.options import parse_request, resolve_options
from server.heads import Canary, HeadRegistry, ServedHead, choose_default
from tests.server.fakes import describe_head

TOKEN, SEQUENCE = describe_head(), describe_head("sequence")


def make_registry(**heads) -> HeadRegistry:
    return HeadRegistry(heads or {"a": TOKEN, "b": TOKEN}, "a")


def choose(registry, seed=None, **adaptive):
    request = parse_request(adaptive)
    options = resolve_options(request, registry.by_name, registry.default, lambda marker: [7])
    return registry.choose(options, request, seed)


def count(registry, num_requests=2000, **adaptive) -> Counter:
    return Counter(choose(registry, **adaptive)[0].name for _ in range(num_requests))


def test_a_request_gets_the_head_that_it_asks_for():
    registry = make_registry()
    for asked, name in [({}, "a"), ({"head": "b"}, "b")]:
        options, head = choose(registry, **asked)
        assert (options.name, head.name, options.generation) == (name, name, 0)
    assert choose(registry, policy="entropy")[1] is None


def test_the_default_is_the_first_trained_head_that_has_not_failed_the_gate():
    unjudged = describe_head(trained=True)
    passed, failed = (
        unjudged.model_copy(update={"gate": outcome}) for outcome in ("passed", "failed")
    )
    assert choose_default({"a": failed, "b": unjudged, "c": passed}) == "b"
    assert choose_default({"a": passed, "b": unjudged}) == "a"
    assert choose_default({"a": failed, "b": failed}) == "a"
    # TOKEN is untrained: its choices mean nothing.
    assert choose_default({"a": TOKEN, "b": unjudged}) == "b"
    assert choose_default({"a": TOKEN, "b": failed}) == "b"
    assert choose_default({"a": TOKEN, "b": TOKEN}) == "a"
    assert choose_default({}) is None


def test_a_head_that_comes_later_has_a_generation_of_its_own():
    registry = make_registry()
    registry.put(ServedHead("a", registry.next_generation(), SEQUENCE))
    registry.put(ServedHead("c", registry.next_generation(), TOKEN))
    options, _ = choose(registry)
    assert (options.name, options.generation, options.level) == ("a", 1, "sequence")
    assert choose(registry, head="c")[0].generation == 2
    assert choose(registry, head="b")[0].generation == 0


@pytest.mark.parametrize("percent", [5, 50])
def test_a_canary_gets_its_share(percent):
    registry = make_registry()
    registry.set_canary("a", Canary("b", percent))
    share = count(registry)["b"] / 2000
    # Four standard deviations.
    assert share == pytest.approx(percent / 100, abs=4 * (0.25 / 2000) ** 0.5)
    assert count(registry, 50, head="b") == {"b": 50}, "a canary's own requests are its own"


def test_all_or_none_go_to_a_canary_at_the_ends():
    registry = make_registry()
    registry.set_canary("a", Canary("b", 100))
    assert count(registry, 100) == {"b": 100}
    registry.set_canary("a", None)
    assert count(registry, 100) == {"a": 100} and not registry.canaries


def test_the_same_seed_is_answered_by_the_same_head():
    registry = make_registry()
    registry.set_canary("a", Canary("b", 50))
    names = [choose(registry, seed=seed)[0].name for seed in range(300)]
    assert names == [choose(registry, seed=seed)[0].name for seed in range(300)]
    assert 100 < names.count("b") < 200


def test_a_canary_of_another_level_leaves_requests_alone_that_insist_on_theirs():
    registry = make_registry(a=TOKEN, b=SEQUENCE)
    registry.set_canary("a", Canary("b", 100))
    options, _ = choose(registry)
    assert (options.name, options.level) == ("b", "sequence")
    options, _ = choose(registry, level="token")
    assert (options.name, options.level) == ("a", "token")


def test_a_canary_selects_as_it_does_itself_unless_the_request_says_how():
    registry = make_registry(a=TOKEN, b=describe_head(select="mean"))
    assert choose(registry)[0].select == "argmax"
    registry.set_canary("a", Canary("b", 100))
    assert choose(registry)[0].select == "mean"
    assert choose(registry, select="sample")[0].select == "sample"


def test_a_canary_of_a_canary_is_not_asked():
    registry = make_registry(a=TOKEN, b=TOKEN, c=TOKEN)
    registry.set_canary("a", Canary("b", 100))
    registry.set_canary("b", Canary("c", 100))
    assert choose(registry)[0].name == "b"
    assert registry.find_canaries("b").keys() == {"a", "b"}


def test_a_canary_abstains_in_its_own_way():
    abstain = Abstention(threshold=0.5, fallback=0.7, statistic="probability")
    abstaining = TOKEN.model_copy(update={"abstain": abstain})
    registry = make_registry(a=TOKEN, b=abstaining)
    registry.set_canary("a", Canary("b", 100))
    assert choose(registry)[0].parameters == (0.5, 0.7, 1.0)
    assert choose(registry, abstain=False)[0].parameters == ()
    # And none answers a request that wants a fallback, if it has none.
    registry = make_registry(a=abstaining, b=TOKEN)
    registry.set_canary("a", Canary("b", 100))
    assert choose(registry, abstain=True)[0].name == "a"
    assert choose(registry)[0].name == "b" and not choose(registry)[0].can_abstain
