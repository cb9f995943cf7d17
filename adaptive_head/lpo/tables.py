"""The results of an evaluation as Markdown, from nothing but `results.json`'s content."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptive_head.lpo.arms import format_temperature
from adaptive_head.lpo.statistics import MIN_PROMPTS, Interval

Json = Mapping[str, Any]
# Labels of these leave open which temperature it is.
_UNNAMED = ("meanshift", "best_fixed", "best_fixed_overall")
_PLOTS = {
    "temperatures.png": "How often each temperature was chosen",
    "win_rates.png": "Win rates of the heads, with 95 % intervals",
    "positions.png": "Mean temperature by the token's position",
    "spans.png": "Mean temperature by the distance from the beginning of a span",
}


def render_tables(results: Json, plots: Sequence[str]) -> str:
    """The whole file.

    Args:
        plots: names of the files that there are.
    """
    lines = [*_render_opening(results)]
    for name, head in results["heads"].items():
        lines += ["", f"## Head {name} ({head['level']} level)", "", head["verdict"]]
        for task, of_task in head["tasks"].items():
            about = results["tasks"][task]
            num_prompts = about["num_prompts"]["test"]
            lines += ["", f"### {task}: {about['metric']}, {num_prompts} prompts", ""]
            lines += _render_rows(of_task["rows"], about["metric"], num_prompts)
        if head["average"]:
            num_prompts = min(
                results["tasks"][task]["num_prompts"]["test"] for task in head["tasks"]
            )
            lines += ["", f"### Average over {len(head['tasks'])} tasks", ""]
            lines += _render_rows(head["average"], "mean of the metrics", num_prompts, True)
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
        f"{task} {about['num_prompts']['test']}" for task, about in results["tasks"].items()
    )
    num_rows = sum(
        len([row for row in rows if "win_rate" in row])
        for head in results["heads"].values()
        for rows in [*(task["rows"] for task in head["tasks"].values()), head["average"] or []]
    )
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    yield f"# {results['experiment']}: evaluation"
    if results["about"]:
        yield from ("", results["about"])
    yield ""
    yield f"- Model: {results['model']['name'] if results['model'] else 'unknown'}"
    yield f"- Test prompts: {prompts}; {results['num_responses']} answers to each in every arm"
    yield f"- Seed: {results['seed']}"
    yield (
        f"- Generated: {results['num_tokens']:,} tokens in {results['num_seconds']:,.0f} s "
        f"on {machine['gpu'] or machine['cpu']}, {machine['num_cores']} cores; {packages}"
    )
    yield ""
    yield (
        "In brackets are 95 % intervals, from a bootstrap over prompts "
        f"({results['num_bootstrap']:,} resamples), paired by prompt and sample. The head wins a "
        "sample that has the higher metric, or, where that is equal, the higher of the task's "
        "further rewards in their order; a tie is half a win. **Bold**: the interval excludes no "
        f"difference. Of {num_rows} win rates about {num_rows / 20:.0f} would be bold if no arm "
        f"differed from any other. With fewer than {MIN_PROMPTS} prompts nothing is bold."
    )
    yield ""
    yield (
        "The best fixed temperatures were chosen on training prompts; MeanShift is the mean of the "
        "head's temperatures on the task's test prompts; shuffled are the same temperatures in "
        "random order."
    )


def _render_rows(
    rows: Sequence[Json], metric: str, num_prompts: int, is_average: bool = False
) -> Iterator[str]:
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
            is_marked = num_prompts >= MIN_PROMPTS
            cells.append(_mark(row["difference"], 0.0, _show(row["difference"], "+"), is_marked))
            cells.append(_mark(row["win_rate"], 0.5, _show_percent(row["win_rate"]), is_marked))
        else:
            cells += ["", ""]
        yield f"| {' | '.join(cells)} |"


def _show(interval: Json, sign: str = "") -> str:
    mean, low, high = (f"{interval[key]:{sign}.3f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _show_percent(interval: Json) -> str:
    mean, low, high = (f"{100 * interval[key]:.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _mark(interval: Json, even: float, text: str, is_marked: bool) -> str:
    return f"**{text}**" if is_marked and Interval(**interval).excludes(even) else text


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
