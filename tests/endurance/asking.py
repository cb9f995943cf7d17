"""Sends planned requests, many at once, and keeps accounts of what comes back."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import httpx

from loadtests.accounts import Accounts, Entry
from tests.endurance.plans import Plan
from tests.fuzz.sending import ANSWER_S, is_whole

# A client that leaves before its answer gives it this many seconds.
LEAVE_S = 0.005
POLL_S = 0.02
# Less than the server's five seconds, or a request could meet a connection that it is closing.
KEEP_ALIVE_S = 2.0
WHOLE, REFUSED, LEFT = "whole", "refused", "left"


class Crowd:
    """Clients of one server.

    Attributes:
        accounts: the tokens of all answers.
        counts: how many requests went to each route, by what came of them.
        num_prompts: adaptive ones of answers that ended, and of those that did not.
        wrong: what should not have come, with the request.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.accounts = Accounts()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.num_prompts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def send_all(self, plans: Iterator[Plan], num_clients: int) -> None:
        """Send requests, as many at once as there are clients."""

        async def work() -> None:
            # The clients share the iterator: each takes the next request.
            for plan in plans:
                await self.send(plan)

        await asyncio.gather(*(work() for _ in range(num_clients)))

    async def send(self, plan: Plan) -> None:
        entry = self.accounts.begin(plan.is_adaptive, plan.max_tokens)
        try:
            outcome = await (self._read_stream if plan.is_stream else self._read)(plan, entry)
        except (httpx.TransportError, ValueError, KeyError) as error:
            outcome = type(error).__name__
            self.wrong.append(f"{outcome}: {error}: {plan}")
        self.counts[plan.path, outcome] += 1
        if plan.is_adaptive:
            self.num_prompts[outcome] += plan.num_prompts

    def _build(self, plan: Plan) -> httpx.Request:
        if plan.body is None:
            return self._http.build_request("GET", plan.path)
        # httpx would not encode a lone surrogate.
        headers = {"content-type": "application/json"}
        content = json.dumps(plan.body)
        return self._http.build_request("POST", plan.path, content=content, headers=headers)

    async def _read(self, plan: Plan, entry: Entry) -> str:
        try:
            leaves_before = plan.leaves_after == 0 and not plan.is_background
            async with asyncio.timeout(LEAVE_S if leaves_before else None):
                response = await self._http.send(self._build(plan))
        except TimeoutError:
            return LEFT
        if plan.is_background and response.is_success:
            url = f"{plan.path}/{response.json()['id']}"
            if plan.leaves_after == 0:
                await self._http.post(f"{url}/cancel")
                return LEFT
            while response.json()["status"] in ("queued", "in_progress"):
                await asyncio.sleep(POLL_S)
                response = await self._http.get(url)
        return self._judge(plan, entry, response, response.text)

    async def _read_stream(self, plan: Plan, entry: Entry) -> str:
        seen: dict[int, int] = {}
        lines, num_chunks = [], 0
        response = await self._http.send(self._build(plan), stream=True)
        async with aclosing(response):
            async for line in response.aiter_lines():
                if plan.leaves_after == num_chunks:
                    return LEFT
                lines.append(line)
                if line.startswith("data: {"):
                    num_chunks += 1
                    count_tokens(json.loads(line[6:]), seen)
                    entry.low = min(sum(seen.values()), plan.max_tokens)
        text = "\n".join(lines)
        if response.is_success and not is_whole(text, plan.path):
            self.wrong.append(f"a cut stream, {text[-300:]}: {plan}")
            return "cut"
        return self._judge(plan, entry, response, text, sum(seen.values()))

    def _judge(
        self, plan: Plan, entry: Entry, response: httpx.Response, text: str, num_tokens: int = 0
    ) -> str:
        """Settle the account of an answer that has ended."""
        is_right = response.status_code == 400 if plan.is_refused else response.is_success
        if is_right and not plan.is_refused:
            is_right = ('"adaptive":{' in text.replace(" ", "")) == plan.has_report
        if not is_right:
            self.wrong.append(f"{response.status_code} {text[-300:]}: {plan}")
            return str(response.status_code)
        if plan.is_refused:
            entry.settle(0)
            return REFUSED
        if plan.path == "/generative_scoring":
            # Its usage leaves out what was generated.
            num_tokens = plan.max_tokens
        elif not plan.is_stream and isinstance(usage := response.json().get("usage"), dict):
            num_tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
        entry.settle(num_tokens)
        return WHOLE


def count_tokens(event: dict[str, Any], seen: dict[int, int]) -> None:
    """Count what an event of a stream says.

    Args:
        seen: the tokens of each choice so far.
    """
    kind = event.get("type", "")
    if kind in ("response.output_text.delta", "content_block_delta"):
        seen[0] = seen.get(0, 0) + 1
    elif kind in ("response.completed", "response.incomplete"):
        seen[0] = event["response"]["usage"]["output_tokens"]
    elif kind == "message_delta":
        seen[0] = event["usage"]["output_tokens"]
    elif (usage := event.get("usage")) and "choices" in event:
        if event["choices"]:
            seen[event["choices"][0]["index"]] = usage["completion_tokens"]
        else:
            # The last one has the sum.
            seen.clear()
            seen[0] = usage["completion_tokens"]


async def ask_all(url: str, plans: Iterator[Plan], num_clients: int) -> Crowd:
    """Send requests from as many clients at once; returns what they have seen."""
    limits = httpx.Limits(max_connections=num_clients, keepalive_expiry=KEEP_ALIVE_S)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=limits) as http:
        crowd = Crowd(http)
        await crowd.send_all(plans, num_clients)
    return crowd
