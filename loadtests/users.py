"""Locust's users: each behaves like a kind of application."""

from typing import ClassVar

from locust import User, task

from loadtests.client import Client
from loadtests.session import Session
from loadtests.workload import Workload


class _AdaptiveUser(User):
    """Asks, thinks, and asks again."""

    abstract = True
    kind: ClassVar[str]
    session: ClassVar[Session]

    def on_start(self) -> None:
        session = self.session
        number = f"{self.kind}-{session.number_user()}"
        self._workload = Workload(session.scenario, session.target, number)
        self._client = Client(
            session.target, session.accounts, self.environment.events.request.fire
        )

    def on_stop(self) -> None:
        self._client.close()

    def wait_time(self) -> float:
        return self._workload.draw_think_time()

    @task
    def ask(self) -> None:
        answer = self._client.send(self._workload.make(self.kind))
        if answer is not None and self.kind == "chat":
            self._workload.continue_chat(answer.text)


class ChatUser(_AdaptiveUser):
    """Reads a streamed answer, thinks, and asks on; each question carries the chat so far."""

    abstract = True
    kind = "chat"


class BatchUser(_AdaptiveUser):
    """Completes several prompts in one request, with several answers each; it does not stream."""

    abstract = True
    kind = "batch"


class LongPromptUser(_AdaptiveUser):
    """Asks about a long text; the answer is streamed."""

    abstract = True
    kind = "long_prompt"


class LeavingUser(_AdaptiveUser):
    """Closes the connection in the middle of a long stream."""

    abstract = True
    kind = "leaving"


USERS = (ChatUser, BatchUser, LongPromptUser, LeavingUser)
