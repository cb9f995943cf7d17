"""Mixed requests: all routes, policies and reports, several answers, and clients that leave."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

MAX_TOKENS = 24
POLICIES: list[dict[str, Any]] = [
    {},
    {"head": "sequence"},
    {"head": "token", "scale": 0.5, "max": 0.3},
    {"head": "token", "select": "mean"},
    {"policy": "entropy"},
    {"policy": "schedule", "schedule": {"start": 1.0, "end": 0.2, "tokens": 8}},
    {"policy": "two_phase"},
    {"policy": "constant", "constant": {"temperature": 0.4}},
    {"policy": "list", "list": {"temperatures": [0.2, 0.7]}},
]
REPORTS = ("none", "summary", "tokens")
# For whole chats and completions; most requests have none of them.
EXTRAS: list[dict[str, Any]] = [{}] * 6 + [
    {"seed": 5},
    {"ignore_eos": True},
    {"prompt_logprobs": 1},
    {"logit_bias": {"5": -1}},
    {"structured_outputs": {"regex": "[a-z]+"}},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.1},
]
REFUSED: list[dict[str, Any]] = [
    {"temperature": "adaptve"},
    {"temperature": "adaptive", "adaptive": {"head": "gone"}},
    {"n": 1000},
    {"stop": "a" * 300},
    {"stop": "\ud800"},
    {"structured_outputs": 5},
]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
# How many of a hundred requests ask each route. The last ones generate nothing.
ROUTES = {
    "/v1/chat/completions": 30,
    "/v1/completions": 27,
    "/v1/responses": 12,
    "/v1/messages": 9,
    "/v1/chat/completions/batch": 4,
    "/invocations": 4,
    "/generative_scoring": 3,
    "/tokenize": 4,
    "/detokenize": 3,
    "/v1/messages/count_tokens": 2,
    "/v1/models": 2,
}
CHATS = ("/v1/chat/completions", "/v1/chat/completions/batch", "/invocations", "/v1/messages")


@dataclass(frozen=True)
class Plan:
    """A request, and what is to come of it.

    Attributes:
        body: None for a GET.
        max_tokens: of all answers together.
        num_prompts: how many the engine gets.
        leaves_after: after how many chunks of its stream the client leaves; 0: before an answer;
            None: it stays.
    """

    path: str
    body: dict[str, Any] | None
    max_tokens: int = 0
    num_prompts: int = 0
    is_adaptive: bool = False
    is_refused: bool = False
    leaves_after: int | None = None

    @property
    def is_stream(self) -> bool:
        return bool(self.body and self.body.get("stream")) and not self.is_refused

    @property
    def is_background(self) -> bool:
        return bool(self.body and self.body.get("background")) and not self.is_refused

    @property
    def has_report(self) -> bool:
        """Whether the answer says which temperatures it had."""
        adaptive = (self.body or {}).get("adaptive", {})
        return self.is_adaptive and adaptive.get("report") != "none"


def make_plan(rng: Random, model: str) -> Plan:
    """The next request."""
    (path,) = rng.choices([*ROUTES], [*ROUTES.values()])
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
    messages = [{"role": "user", "content": text}]
    items = rng.sample(WORDS, rng.randint(1, 3))
    if path == "/v1/models":
        return Plan(path, None)
    if path == "/tokenize":
        return Plan(path, {"model": model, "prompt": text})
    if path == "/detokenize":
        return Plan(path, {"model": model, "tokens": [rng.randrange(1000) for _ in range(9)]})
    if path == "/v1/messages/count_tokens":
        return Plan(path, {"model": model, "messages": messages})
    if path == "/generative_scoring":
        body = {"model": model, "query": text, "items": items, "label_token_ids": [1, 2]}
        # One token for each item.
        return Plan(path, body, len(items), len(items))
    num_tokens, num_prompts, num_choices = rng.randint(1, MAX_TOKENS), 1, 1
    length = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {"model": model, length: num_tokens}
    if path in ("/v1/chat/completions", "/v1/completions", "/invocations"):
        body["n"] = num_choices = rng.choice((1, 1, 1, 2, 4))
    if path == "/v1/completions":
        body["prompt"] = rng.choice([text, items, [5, 6, 7]])
        num_prompts = len(items) if body["prompt"] is items else 1
    elif path == "/v1/responses":
        is_background = rng.random() < 0.05
        body |= {"input": text, "store": is_background, "background": is_background}
    elif path == "/v1/chat/completions/batch":
        body["messages"] = [messages] * len(items)
        num_prompts = len(items)
    else:
        body["messages"] = messages
    plan = Plan(path, body, num_tokens * num_prompts * num_choices, num_prompts)
    return leave(rng, vary(rng, choose_temperature(rng, plan)))


def choose_temperature(rng: Random, plan: Plan) -> Plan:
    """Add a temperature, which is adaptive for two requests in three."""
    body = dict(plan.body or {})
    if rng.random() < 1 / 3:
        return replace(plan, body=body | rng.choice([{}, {"temperature": 0.7}]))
    adaptive = rng.choice(POLICIES) | {"report": rng.choice(REPORTS)}
    way = rng.choice(("temperature", "object", "name"))
    if way == "temperature":
        body |= {"temperature": "adaptive", "adaptive": adaptive}
    elif way == "object":
        body |= {"adaptive": adaptive}
    else:
        body["model"] += ":adaptive"
    return replace(plan, body=body, is_adaptive=True)


def vary(rng: Random, plan: Plan) -> Plan:
    """Make some requests streams, some unusual, and some wrong."""
    body = dict(plan.body or {})
    if rng.random() < 0.03:
        wrong = rng.choice(REFUSED)
        return replace(plan, body=body | wrong, is_refused=True, is_adaptive=False)
    can_stream = not plan.path.endswith("/batch") and not body.get("background")
    if can_stream and rng.random() < 0.5:
        body["stream"] = True
        if plan.path not in ("/v1/responses", "/v1/messages"):
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    elif plan.path in ("/v1/chat/completions", "/v1/completions"):
        body |= rng.choice(EXTRAS)
    return replace(plan, body=body)


def leave(rng: Random, plan: Plan) -> Plan:
    """Let the client of one request in eight leave early."""
    if plan.is_refused or rng.random() > 1 / 8:
        return plan
    return replace(plan, leaves_after=rng.randint(0, 6) if plan.is_stream else 0)
