"""What must hold at the end of a run."""

import pytest

from loadtests.accounts import Accounts
from loadtests.checks import WrongAnswerError
from loadtests.client import ITL, REQUEST, TTFT
from loadtests.session import Session
from loadtests.target import ADAPTIVE_TOKENS, ALL_TOKENS
from tests.loadtests.samples import make_scenario

BEFORE = {ADAPTIVE_TOKENS: 100.0, ALL_TOKENS: 500.0}


def make_accounts() -> Accounts:
    """30 adaptive tokens, 20 fixed ones, and a client that left after 5 of 40."""
    accounts = Accounts()
    accounts.begin(True, 64).settle(30)
    accounts.begin(False, 64).settle(20)
    accounts.begin(True, 40).low = 5
    return accounts


@pytest.mark.parametrize(
    ("adaptive", "total", "num_wrong"),
    [(35, 55, 0), (70, 90, 0), (34, 55, 1), (35, 54, 1), (71, 91, 2), (35, 91, 1)],
)
def test_tokens_must_add_up(adaptive, total, num_wrong):
    after = {ADAPTIVE_TOKENS: 100.0 + adaptive, ALL_TOKENS: 500.0 + total}
    wrong = make_accounts().compare(BEFORE, after)
    assert len(wrong) == num_wrong
    assert all("other clients?" in sentence for sentence in wrong)


def test_without_a_client_that_leaves_the_count_is_exact():
    accounts = make_accounts()
    accounts.entries.pop()
    (wrong,) = accounts.compare(BEFORE, {ADAPTIVE_TOKENS: 131.0, ALL_TOKENS: 550.0})
    assert f"counted 30 tokens, but the server's {ADAPTIVE_TOKENS} rose by 31" in wrong


def list_broken(limits=None, errors=(), ttfts=()) -> str:
    session = Session(make_scenario(limits=limits or {}))
    for error in errors:
        session.hear(REQUEST, 5.0, error)
    for ttft in ttfts:
        session.hear(TTFT, 1000 * ttft, None)
    session.hear(ITL, 1e9, None)
    return "; ".join(session.find_broken_limits())


def test_a_run_within_its_limits_is_right():
    ttfts = [0.1] * 99 + [9.0]
    errors = [None] * 99 + [OSError("reset")]
    assert list_broken({"max_ttft": 1, "max_failed": 0.01}, errors, ttfts) == ""


def test_a_run_without_an_answer_is_wrong():
    assert list_broken() == "no request came to its end"


def test_no_answer_may_be_wrong_whatever_the_limits():
    errors = [None] * 99 + [WrongAnswerError("no usage")]
    assert list_broken({"max_failed": 1}, errors) == "1 of 100 answers were wrong"


def test_more_failures_than_allowed_are_wrong():
    errors = [None] * 98 + [OSError("reset")] * 2
    broken = list_broken({"max_failed": 0.01}, errors)
    assert broken == "2 of 100 requests failed, and 1.00% may (limits.max_failed)"


def test_slow_streams_are_wrong():
    broken = list_broken({"max_ttft": 1}, [None], [0.1] * 80 + [2.0] * 20)
    assert (
        broken
        == "5 % of the streams took 2.00 s or more to begin, and may take 1 (limits.max_ttft)"
    )


def test_a_run_that_never_began_is_wrong():
    (wrong,) = Session(make_scenario()).end()
    assert wrong == "the run was over before the server had said what it serves"
