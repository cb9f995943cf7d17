"""Measures adaptive against fixed: blocks of the same requests, in turns (ABBA).

A program of its own, which `loadtests.compare` starts: gevent has to patch Python's sockets before
anything else uses them. A plan comes in by the standard input, measurements leave by the standard
output.
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()

import sys
from time import perf_counter

from gevent.pool import Group

from loadtests.accounts import Accounts, close_accounts
from loadtests.answers import Answer
from loadtests.client import REQUEST, Client
from loadtests.measurements import Arm, Block, Measurements, Plan, assign_kinds, order_blocks
from loadtests.target import (
    CPU_SECONDS,
    Target,
    TargetError,
    find_target,
    read_counters,
    read_version,
)
from loadtests.workload import Workload


def main() -> None:
    """Read the plan, carry it out, write what was measured; exit with 2 if it cannot be done."""
    plan = Plan.model_validate_json(sys.stdin.read())
    try:
        measurements = measure(plan)
    except TargetError as error:
        print(f"loadtests: {error}", file=sys.stderr)
        sys.exit(2)
    print(measurements.model_dump_json())


def measure(plan: Plan) -> Measurements:
    """Run all blocks; after Ctrl-C, those that were run to their end.

    Raises:
        TargetError: a server cannot be load-tested, or did not survive.
    """
    targets = {
        arm: find_target(url, [style for style in plan.scenario.styles if style.arm == arm])
        for arm, url in plan.urls.items()
    }
    before = {target.url: read_counters(target.url) for target in targets.values()}
    accounts = {url: Accounts() for url in before}
    measurements = Measurements(
        plan=plan,
        model=targets["adaptive"].model,
        heads={name: head.temperatures for name, head in targets["adaptive"].heads.items()},
        versions={arm: read_version(target.url) for arm, target in targets.items()},
    )
    try:
        for pair, arm in order_blocks(plan.num_pairs):
            target = targets[arm]
            block = run_block(plan, pair, arm, target, accounts[target.url])
            measurements.blocks.append(block)
            name = f"pair {pair + 1} of {plan.num_pairs}" if pair >= 0 else "warming up"
            print(f"{name}, {arm}: {block.seconds:.1f} s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("Interrupted: the report has the pairs so far.", file=sys.stderr)
    for url, account in accounts.items():
        wrong, _ = close_accounts(account, url, before[url], plan.scenario.limits.max_idle_wait)
        measurements.wrong_tokens += wrong
    return measurements


def run_block(plan: Plan, pair: int, arm: Arm, target: Target, accounts: Accounts) -> Block:
    """Let every user send its requests, one after the other and without pause."""
    block = Block(arm=arm, pair=pair)

    def hear(request_type: str, exception: Exception | None, **_: object) -> None:
        if request_type == REQUEST:
            block.num_requests += 1
            if exception is not None:
                block.failures.append(str(exception))

    def act(number: int, kind: str) -> None:
        # Both arms of a pair ask the same; the salt keeps the prefix cache out of the second.
        seed = f"pair {pair}, user {number}"
        workload = Workload(plan.scenario, target, seed, arm, salt=f"{arm[0]}{pair}")
        client = Client(target, accounts, hear)
        for _ in range(plan.num_requests):
            answer = client.send(workload.make(kind))
            if answer is not None:
                count_answer(block, answer)
                if kind == "chat":
                    workload.continue_chat(answer.text)
        client.close()

    users = Group()
    num_users = max(stage.users for stage in plan.scenario.stages)
    first, second = read_cpu(target), read_cpu(target)
    start = perf_counter()
    try:
        for number, kind in enumerate(assign_kinds(plan.scenario.mix, num_users)):
            users.spawn(act, number, kind)
        users.join(raise_error=True)
    finally:
        users.kill()
    block.seconds = perf_counter() - start
    # Less what it costs the server to say so.
    block.cpu_seconds = read_cpu(target) - second - (second - first)
    return block


def read_cpu(target: Target) -> float:
    """Processor seconds of the server's API process so far; 0 if it does not say."""
    return read_counters(target.url)[CPU_SECONDS]


def count_answer(block: Block, answer: Answer) -> None:
    """Add what an answer took to its block."""
    block.num_tokens += answer.num_tokens or 0
    if answer.ttft is not None:
        block.ttfts.append(answer.ttft)
    if answer.itl is not None:
        block.itls.append(answer.itl)
    for choice in answer.choices.values():
        if choice.adaptive and choice.chooser:
            counts = block.temperatures.setdefault(choice.chooser, {})
            for key, count in choice.adaptive["histogram"].items():
                counts[key] = counts.get(key, 0) + count


if __name__ == "__main__":
    main()
