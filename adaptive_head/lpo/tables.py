"""The results of an evaluation as Markdown, from nothing but `results.json`'s content."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptive_head.lpo.arms import format_temperature
from adaptive_head.lpo.statistics import LEVEL, MIN_GROUPS, Interval

Json = Mapping[str, Any]
# Labels of these leave open which temperature it is.
_UNNAMED = ("meanshift", "equal_surprisal", "best_fixed", "best_fixed_overall")
_PLOTS = {
    "temperatures.png": "How often each temperature was chosen",
    "win_rates.png": "Win rates of the heads, with simultaneous 95 % intervals",
    "positions.png": "Mean temperature by the token's position",
    "spans.png": "Mean temperature by the distance from the beginning of a span",
}


def render_tables(results: Json, plots: Sequence[str]) -> str:
    """The whole file.

    Args:
        plots: names of the files that there are.
    """
    lines = [*_render_opening(results)]
    label = "" if results["primary"] else " (exploratory)"
    for name, head in results["heads"].items():
        lines += ["", f"## Head {name} ({head['level']} level)", "", head["verdict"]]
        if not all(head["trained"]):
            lines += ["", _describe_failures(head["trained"])]
        for task, of_task in head["tasks"].items():
            about = results["tasks"][task]
            size = f"{about['num_prompts']['test']} prompts in {about['num_groups']['test']} groups"
            lines += ["", f"### {task}: {about['metric']}, {size}{label}", ""]
            lines += _render_rows(of_task["rows"], about["metric"])
        if head["average"]:
            fewest = min(results["tasks"][task]["num_groups"]["test"] for task in head["tasks"])
            size = f"at least {fewest} groups each"
            lines += ["", f"### Average over {len(head['tasks'])} tasks, {size}{label}", ""]
            lines += _render_rows(head["average"], "mean of the metrics", True)
        lines += ["", "### Temperatures that it chose", "", *_render_choices(head)]
    lines += ["", "## Every reward", "", "Means over the test prompts."]
    for task, about in results["tasks"].items():
        lines += ["", f"### {task}", "", *_render_rewards(about["rewards"])]
    if plots:
        lines += ["", "## Plots"]
        lines += [line for name in plots for line in ("", f"![{_PLOTS[name]}]({name})")]
    return "\n".join(lines) + "\n"


def _render_opening(results: Json) -> Iterator[str]:
    machine = results["machine"]
    prompts = ", ".join(
        f"{task} {about['num_prompts']['test']} in {about['num_groups']['test']} groups"
        for task, about in results["tasks"].items()
    )
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    yield f"# {results['experiment']}: evaluation"
    if results["about"]:
        yield from ("", results["about"])
    yield ""
    yield f"- Model: {results['model']['name'] if results['model'] else 'unknown'}"
    standing = "primary" if results["primary"] else "exploratory"
    yield f"- Standing: {standing}"
    yield (
        f"- Test prompts: {prompts}; in every arm {results['num_responses']} answers to each in "
        f"each of {results['num_streams']} streams"
    )
    yield f"- Trainings of each head: {results['num_training_seeds']}; the first one's ships"
    yield f"- Seed: {results['seed']}"
    yield (
        f"- Generated: {results['num_tokens']:,} tokens in {results['num_seconds']:,.0f} s "
        f"on {machine['gpu'] or machine['cpu']}, {machine['num_cores']} cores; {packages}"
    )
    yield ""
    yield (
        "In brackets are intervals from a bootstrap over training seeds, groups of prompts and "
        f"streams ({results['num_bootstrap']:,} resamples), paired by prompt and sample. Prompts "
        "of one group share their content. All intervals in one column of differences or wins hold "
        "together at 95 %: each is wider by Bonferroni's correction for the number of comparisons "
        "printed under the table. The head wins a sample that has the higher metric, or, where "
        "that is equal, the higher of the task's further rewards in their order; a tie is half a "
        "win. "
        "**Bold**: the interval of the win rate excludes 50 %. With fewer than "
        f"{MIN_GROUPS} groups there is no interval."
    )
    yield ""
    yield (
        "The best fixed temperatures, EDT, min-p, top-p and the head with min-p were tuned on "
        "training prompts, each with equally many settings and, over all of them, at least "
        f"{results['num_tuning_responses']} answers to each prompt, by win rate against the "
        "control's other settings. MeanShift is "
        "the mean of the head's temperatures on the task's test prompts; the constant of equal "
        "entropy is the one whose answers are as surprising at temperature 1; shuffled are the "
        "same temperatures in random order, within the answer or dealt to other prompts."
    )


def _render_rows(rows: Sequence[Json], metric: str, is_average: bool = False) -> Iterator[str]:
    yield f"| arm | mean temperature | {metric} | head − arm | the head wins, % |"
    yield "|---|---|---|---|---|"
    for row in rows:
        temperature = "–" if row["temperature"] is None else f"{row['temperature']:.3f}"
        label = row["label"]
        if row["kind"] in _UNNAMED and not is_average and row["temperature"] is not None:
            label += f" ({format_temperature(row['temperature'])})"
        if row["votes"] > 1:
            label += f", maj@{row['votes']}"
        cells = [label, temperature, _show(row["metric"])]
        if "win_rate" in row:
            cells.append(_show(row["difference"], "+"))
            text = _show_percent(row["win_rate"])
            is_decided = Interval(**row["win_rate"]).excludes(0.5)
            cells.append(f"**{text}**" if is_decided else text)
        else:
            cells += ["", ""]
        yield f"| {' | '.join(cells)} |"
    num_comparisons = sum("win_rate" in row for row in rows)
    yield ""
    yield f"{num_comparisons} comparisons; each interval has {_show_level(num_comparisons)}."


def _show_level(num_comparisons: int) -> str:
    return f"{100 * (1 - (1 - LEVEL) / num_comparisons):.2f} %"


def _describe_failures(trained: Sequence[bool]) -> str:
    numbers = [str(number) for number, is_trained in enumerate(trained, start=1) if not is_trained]
    return (
        f"Nothing was learnt in training {', '.join(numbers)} of {len(trained)}: no epoch's "
        "validation loss was below the untrained head's, which was kept."
    )


def _show(interval: Json, sign: str = "") -> str:
    return _bracket(interval, 1, f"{sign}.3f")


def _show_percent(interval: Json) -> str:
    return _bracket(interval, 100, ".1f")


def _bracket(interval: Json, scale: float, form: str) -> str:
    """The mean, and its interval in brackets if it has one."""
    shown = [
        f"{scale * interval[key]:{form}}"
        for key in ("mean", "low", "high")
        if interval[key] is not None
    ]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _render_choices(head: Json) -> Iterator[str]:
    names = [format_temperature(temperature) for temperature in head["temperatures"]]
    unit = "tokens" if head["level"] == "token" else "responses"
    yield f"Mean ± standard deviation over {unit}, and the share of each temperature in %."
    yield ""
    yield f"| task | mean | {' | '.join(names)} |"
    yield "|---" * (2 + len(names)) + "|"
    for task, of_task in head["tasks"].items():
        chosen = of_task["chosen"]
        total = sum(chosen["counts"].values())
        shares = [f"{100 * chosen['counts'][name] / total:.1f}" for name in names]
        yield f"| {task} | {chosen['mean']:.3f} ± {chosen['std']:.3f} | {' | '.join(shares)} |"
    for task, of_task in head["tasks"].items():
        for reward, spans in of_task["chosen"]["spans"].items():
            yield ""
            yield _describe_spans(task, reward, spans)


def _describe_spans(task: str, reward: str, spans: Json) -> str:
    if spans["at_start"] is None or spans["elsewhere"] is None:
        return f"{task}: no answer has a span of {reward} beside other tokens."
    text = (
        f"{task}: the mean temperature is {spans['at_start']:.3f} at the first token of a span of "
        f"{reward} and {spans['elsewhere']:.3f} elsewhere"
    )
    if spans["difference"] is not None:
        text += f"; averaged by prompt the difference is {_show(spans['difference'], '+')}"
    return text + "."


def _render_rewards(rewards: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    names = list(next(iter(rewards.values())))
    yield f"| arm | {' | '.join(names)} |"
    yield "|---" * (1 + len(names)) + "|"
    for arm, means in rewards.items():
        yield f"| {arm} | {' | '.join(f'{means[name]:.3f}' for name in names)} |"
