"""The requests of a scenario: reproducible from its seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loadtests.scenario import Scenario, Style
from loadtests.target import Target

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"

QUESTIONS = (
    "What would you cook with {} and {}?",
    "Write two sentences about {} and {}.",
    "Is {} older than {}? Say why.",
    "Explain {} to somebody who only knows {}.",
    "Name three things that {} and {} have in common.",
)
WORDS = (
    "apples", "bridges", "candles", "deserts", "engines", "forests", "glass", "harbours",
    "islands", "jazz", "kites", "lighthouses", "mountains", "needles", "oceans", "paper",
    "quilts", "rivers", "salt", "trains", "umbrellas", "violins", "winter", "yeast",
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A request, and what must be true of its answer.

    Attributes:
        kind: chat, batch, long_prompt or leaving.
        num_choices: answers in the response.
        leave_after: tokens after which the client leaves; None for one that stays.
    """

    kind: str
    path: str
    body: dict[str, Any]
    style: Style
    num_choices: int = 1
    leave_after: int | None = None

    @property
    def name(self) -> str:
        """Under which it is counted."""
        return f"{self.kind}, {self.style.arm}"

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def max_tokens(self) -> int:
        """The most tokens that the whole response can have."""
        return int(self.body["max_tokens"]) * self.num_choices


class Workload:
    """One user's requests.

    Args:
        number: users of one scenario with different numbers ask different things.
        arm: only the styles of this arm, "adaptive" or "fixed"; all of them if None.
        salt: begins every prompt, so that those of two workloads have nothing in common.
    """

    def __init__(
        self,
        scenario: Scenario,
        target: Target,
        number: str,
        arm: str | None = None,
        salt: str = "",
    ) -> None:
        self._work = scenario.work
        self._target = target
        self._rng = random.Random(f"{scenario.seed}/{number}")
        self._styles = [s for s in scenario.styles if arm in (None, s.arm)]
        self._salt = salt
        self._chat: list[dict[str, str]] = []

    def draw_think_time(self) -> float:
        """Seconds until the next request."""
        return self._rng.uniform(*self._work.think_time)

    def make(self, kind: str) -> Ask:
        """The next request of a kind."""
        if kind == "batch":
            return self._make_batch()
        if kind == "leaving":
            return self._make_leaving()
        return self._make_chat(kind)

    def continue_chat(self, answer: str) -> None:
        """Remember an answer, so that the next request carries the chat so far."""
        self._chat.append({"role": "assistant", "content": answer})

    def _make_chat(self, kind: str) -> Ask:
        question = self._write_question()
        if kind == "long_prompt":
            text = " ".join(self._rng.choices(WORDS, k=self._work.long_prompt_words))
            messages = [{"role": "user", "content": f"{question}\n\n{text}"}]
        else:
            num_asked = sum(message["role"] == "user" for message in self._chat)
            if num_asked >= self._work.turns or (
                self._chat and self._chat[-1]["role"] != "assistant"
            ):
                self._chat = []
            self._chat.append({"role": "user", "content": question})
            messages = list(self._chat)
        fields = {"stream": True, "messages": messages}
        return self._make(
            kind, CHAT_PATH, self._draw_tokens(), self._draw_style(self._styles), fields=fields
        )

    def _make_batch(self) -> Ask:
        work = self._work
        prompts = [self._write_question() for _ in range(work.batch_prompts)]
        # vLLM refuses several greedy answers, which would be the same.
        styles = [s for s in self._styles if s.temperature != 0 or work.batch_n == 1]
        style = self._draw_style(styles)
        num_choices = work.batch_prompts * work.batch_n
        fields = {"prompt": prompts, "n": work.batch_n}
        return self._make(
            "batch", COMPLETION_PATH, self._draw_tokens(), style, num_choices, fields=fields
        )

    def _make_leaving(self) -> Ask:
        fields = {"stream": True, "prompt": self._write_question(), "ignore_eos": True}
        ask = self._make(
            "leaving",
            COMPLETION_PATH,
            self._work.leave_max_tokens,
            self._draw_style(self._styles),
            fields=fields,
        )
        return replace(ask, leave_after=self._work.leave_after)

    def _make(
        self,
        kind: str,
        path: str,
        max_tokens: int,
        style: Style,
        num_choices: int = 1,
        *,
        fields: dict[str, Any],
    ) -> Ask:
        body: dict[str, Any] = {
            "model": self._target.model,
            "max_tokens": max_tokens,
            "seed": self._rng.randrange(1 << 31),
            "ignore_eos": self._work.ignore_eos,
        }
        if fields.get("stream"):
            body["stream_options"] = {"include_usage": True}
        return Ask(kind, path, body | style.fields | fields, style, num_choices)

    def _draw_style(self, styles: Sequence[Style]) -> Style:
        (style,) = self._rng.choices(styles, [style.weight for style in styles])
        return style

    def _draw_tokens(self) -> int:
        return self._rng.randint(*self._work.max_tokens)

    def _write_question(self) -> str:
        # The number keeps the server's prefix cache from knowing the prompt already.
        number = self._rng.randrange(10_000)
        return f"{self._salt}{number}. {self._rng.choice(QUESTIONS)}".format(
            *self._rng.choices(WORDS, k=2)
        )
