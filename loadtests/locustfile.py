"""What locust loads: `locust -f loadtests/locustfile.py --host http://127.0.0.1:8000`.

Environment variables say what is run: LOADTEST_SCENARIO (a scenario's name or file; steady),
LOADTEST_SCALE (times the scenario's users; 1), LOADTEST_DURATION (seconds; the scenario's own),
VLLM_API_KEY (the server's; none).
"""

import logging
import sys
from typing import Any

from locust import events
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import LocalRunner

from loadtests.scenario import ScenarioError
from loadtests.session import Session
from loadtests.settings import read_scenario
from loadtests.shape import StagedShape
from loadtests.target import TargetError
from loadtests.users import USERS

# In locust's column "Type", for what is known only at the end.
END_CHECK = "check"
STOP_TIMEOUT_S = 30

logger = logging.getLogger("loadtests")
# One line for each look at /metrics.
logging.getLogger("httpx").setLevel(logging.WARNING)


class BrokenRunError(Exception):
    """A run that did not keep what it must."""


try:
    SESSION = Session(read_scenario())
except ScenarioError as error:
    print(f"loadtests: {error}", file=sys.stderr)
    sys.exit(2)


class Shape(StagedShape):
    stages = SESSION.scenario.stages

    def tick(self) -> tuple[int, float] | None:
        # A busy server may take longer to say what it serves than the first stage lasts.
        if not SESSION.is_running:
            self.reset_time()
        return super().tick()


# Locust runs the classes that it finds in this module.
for base in USERS:
    weight = getattr(SESSION.scenario.mix, base.kind)
    if weight:
        name = base.__name__
        globals()[name] = type(name, (base,), {"weight": weight, "session": SESSION})


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Refuse now what can be refused now, with one sentence and not in the middle of a log."""
    runner, options = environment.runner, environment.parsed_options
    try:
        if not isinstance(runner, LocalRunner):
            raise TargetError("run one locust process: tokens are counted in one, not in workers")
        if options is not None and options.headless:
            SESSION.begin(environment.host or "")
    except TargetError as error:
        print(f"loadtests: {error}", file=sys.stderr)
        sys.exit(2)
    # Users who are in the middle of an answer may read it to its end.
    environment.stop_timeout = STOP_TIMEOUT_S
    environment.events.request.add_listener(SESSION.hear)


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    environment.process_exit_code = None
    try:
        SESSION.begin(environment.host or "")
    except TargetError as error:
        environment.process_exit_code = 2
        raise StopTest(str(error)) from None


@events.test_stop.add_listener
def end(environment: Environment, **_: Any) -> None:
    if environment.process_exit_code == 2:
        return
    wrong = SESSION.end()
    if environment.runner is not None and environment.runner.exceptions:
        wrong.append("users failed by themselves, see the exceptions above")
    logger.info("Tokens: %s", SESSION.summary)
    for sentence in wrong:
        logger.error("FAILED: %s", sentence)
        # So that the web page shows it, too.
        environment.events.request.fire(
            request_type=END_CHECK,
            name="at the end of the run",
            response_time=0,
            response_length=0,
            exception=BrokenRunError(sentence),
            context={},
        )
    environment.process_exit_code = 1 if wrong else 0
