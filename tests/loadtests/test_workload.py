import pytest

from loadtests.workload import Workload
from tests.loadtests.samples import TARGET, make_scenario

ALL_KINDS = {"chat": 1, "batch": 1, "long_prompt": 1, "leaving": 1}
STYLES = [
    {"temperature": "adaptive", "adaptive": {"report": "tokens"}},
    {"temperature": 0.7},
    {"temperature": 0},
]


def make_workload(number="1", arm=None, salt="", **work) -> Workload:
    return Workload(make_scenario(styles=STYLES, work=work), TARGET, number, arm, salt)


def test_the_same_user_asks_the_same_and_another_user_does_not():
    def list_bodies(number):
        workload = make_workload(number)
        return [workload.make(kind).body for kind in ALL_KINDS for _ in range(3)]

    assert list_bodies("1") == list_bodies("1")
    assert list_bodies("1") != list_bodies("2")


def test_both_arms_ask_for_the_same_work():
    arms = [make_workload(arm=arm, salt=arm[0]) for arm in ("adaptive", "fixed")]
    for kind in ("chat", "batch", "long_prompt") * 5:
        adaptive, fixed = (workload.make(kind) for workload in arms)
        assert adaptive.style.is_adaptive
        assert not fixed.style.is_adaptive
        assert adaptive.max_tokens == fixed.max_tokens
        assert adaptive.body["seed"] == fixed.body["seed"]


def test_no_two_workloads_share_the_beginning_of_a_prompt():
    prompts = [
        make_workload(salt=salt).make("long_prompt").body["messages"][0]["content"]
        for salt in ("a1", "f1")
    ]
    assert prompts[0][:2] == "a1"
    assert prompts[0][2:] == prompts[1][2:]


def test_a_chat_carries_what_was_said_until_it_begins_anew():
    workload = make_workload(turns=2)
    asked = []
    for answer in ("one", "two", "three"):
        asked.append(workload.make("chat").body["messages"])
        workload.continue_chat(answer)
    assert [len(messages) for messages in asked] == [1, 3, 1]
    assert asked[1][1] == {"role": "assistant", "content": "one"}


def test_a_question_without_an_answer_begins_a_new_chat():
    workload = make_workload()
    workload.make("chat")
    assert len(workload.make("chat").body["messages"]) == 1


def test_a_batch_asks_for_several_answers_which_are_never_greedy():
    workload = make_workload(batch_prompts=4, batch_n=3, max_tokens=[5, 5])
    for _ in range(20):
        ask = workload.make("batch")
        assert (len(ask.body["prompt"]), ask.body["n"], ask.num_choices) == (4, 3, 12)
        assert ask.max_tokens == 60
        assert ask.body["temperature"] != 0
        assert not ask.is_stream


def test_a_leaving_client_asks_for_more_than_it_reads():
    ask = make_workload(leave_after=2, leave_max_tokens=90).make("leaving")
    assert (ask.leave_after, ask.max_tokens, ask.body["ignore_eos"]) == (2, 90, True)


@pytest.mark.parametrize(
    ("arm", "name"), [("adaptive", "chat, adaptive"), ("fixed", "chat, fixed")]
)
def test_requests_are_counted_by_kind_and_arm(arm, name):
    assert make_workload(arm=arm).make("chat").name == name
