"""The gate on runs without a model: answers that are bad as often as a test wants."""

import gzip
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from adaptive_head.checkpoint import read_metadata, write_metadata
from adaptive_head.heads import SHIPPED_HEADS
from adaptive_head.lpo.answers import AnswerBook
from adaptive_head.lpo.arms import identify_head
from adaptive_head.lpo.experiment import Experiment, TaskConfig
from adaptive_head.lpo.finished import FinishedEvaluation
from adaptive_head.lpo.gate import Verdict, judge_run, mark_head, pack_run
from adaptive_head.lpo.records import DataError, Prompt, Response, to_line, write_records
from adaptive_head.lpo.statistics import Interval
from adaptive_head.lpo.verdicts import make_verdict_table, write_sentence
from tests.lpo.evaluation_setup import save_heads
from tests.programs import HANG_S

ROOT = Path(__file__).parents[2]

TASK = {
    "prompts": {"generate": "sums", "num_train": 1, "num_test": 1},
    "max_tokens": 8,
    "rewards": {"good": {"kind": "fluency"}},
    "prefer": {"first": "good"},
}
EXPERIMENT = Experiment.model_validate(
    {
        "name": "gated",
        "tasks": {"own": TASK},
        "outside": {"chat": TASK, "code": TASK},
        "ready_heads": {"cautious": "cautious"},
        "rollouts": {"num_responses": 2},
        "evaluation": {"num_bootstrap": 400},
    }
)
IDENTITY = {"weights": "of no head"}
FINE, BAD = (math.log(0.5),) * 8, (math.log(0.001),) * 8
NUM_PROMPTS = {"train": 40, "test": 220}


def write_evaluation(
    folder: Path, experiment: Experiment, shares: dict[str, dict[str, float]]
) -> None:
    """A finished evaluation.

    Args:
        shares: by arm and task, how many of its answers are bad.
    """
    (folder / "prompts").mkdir(parents=True)
    prompts = {
        split: [
            Prompt(f"{task}/{split}/{n}", task, text="?", group=f"{task}/{n}", kind=task)
            for task in experiment.tasks
            for n in range(num)
        ]
        for split, num in NUM_PROMPTS.items()
    }
    for split, of_split in prompts.items():
        write_records(folder / "prompts" / f"{split}.jsonl", of_split)
    (folder / "experiment.json").write_text(experiment.model_dump_json())
    (folder / "evaluation").mkdir()
    heads = {"cautious": {"identity": IDENTITY}}
    (folder / "evaluation" / "results.json").write_text(json.dumps({"heads": heads}))
    (folder / "evaluation" / "results.md").write_text("# Tables\n")
    with AnswerBook(folder / "evaluation" / "answers") as book:
        for arm, of_tasks in shares.items():
            book.open(arm, "key")
            split = "train" if arm.startswith("train") else "test"
            for prompt in prompts[split]:
                share = of_tasks[prompt.task]
                # The same prompts in every arm, so that equal shares are equal answers.
                is_bad = random.Random(prompt.id).random() < share
                book.write(
                    arm,
                    Response(
                        prompt_id=prompt.id,
                        task=prompt.task,
                        sample=0,
                        seed=0,
                        prompt_token_ids=(1, 2),
                        token_ids=tuple(range(8)),
                        temperatures=(0.6,) * 8,
                        text="a b c d e f g h",
                        finish_reason="length",
                        scores={"good": float(not is_bad)},
                        logprobs=BAD if is_bad else FINE,
                    ),
                )


def write_run(folder: Path, chat: float, own: float, constant: float = 0.1) -> Path:
    """A run whose head is bad that often in chats and on its own task, with 0.6 as constant."""
    outside = EXPERIMENT.look_outside()
    assert outside is not None
    good = {"chat": constant, "code": constant}
    hot = dict.fromkeys(good, 0.9)
    arms = {
        "head-cautious": {"chat": chat, "code": constant},
        "fixed-0.6": good,
        "fixed-1": hot,
        "train-fixed-0.6": good,
        "train-fixed-1": hot,
    }
    write_evaluation(folder / "outside", outside, arms)
    of_own = {
        "head-cautious": {"own": own},
        "fixed-0.6": {"own": 0.5},
        "fixed-1": {"own": 0.2},
        "train-fixed-0.6": {"own": 0.5},
        "train-fixed-1": {"own": 0.2},
    }
    write_evaluation(folder, EXPERIMENT, of_own)
    return folder


def test_a_head_as_good_as_the_best_constants_passes(tmp_path):
    (verdict,) = judge_run(write_run(tmp_path / "run", chat=0.1, own=0.2))
    assert verdict.passes and verdict.reasons == []
    assert (verdict.constant, verdict.own_constant) == (0.6, 1.0)
    assert verdict.num_answers == 2 * NUM_PROMPTS["test"]
    assert verdict.bad == verdict.constant_bad == verdict.garbled
    assert verdict.looping == 0.0
    assert verdict.difference.mean == 0.0
    assert verdict.win_rate.mean == 0.5
    assert write_sentence(verdict) == "cautious passes the gate."


def test_kinds_weigh_the_same_and_the_difference_is_that_of_bad_answers(tmp_path):
    (verdict,) = judge_run(write_run(tmp_path / "run", chat=0.3, own=0.2))
    numbers = range(NUM_PROMPTS["test"])
    expected = [
        sum(random.Random(f"{task}/test/{n}").random() < share for n in numbers) / len(numbers)
        for task, share in (("chat", 0.3), ("code", 0.1), ("chat", 0.1), ("code", 0.1))
    ]
    assert verdict.bad == pytest.approx(sum(expected[:2]) / 2)
    assert verdict.constant_bad == pytest.approx(sum(expected[2:]) / 2)
    assert verdict.difference.mean == pytest.approx(verdict.bad - verdict.constant_bad)
    assert verdict.difference.low < verdict.difference.mean < verdict.difference.high
    assert not verdict.passes
    assert "more bad answers than the constant by above 0.02" in write_sentence(verdict)


def test_a_head_that_loses_on_its_own_tasks_fails(tmp_path):
    (verdict,) = judge_run(write_run(tmp_path / "run", chat=0.1, own=0.6))
    assert verdict.reasons == ["loses to the best constant on its own tasks"]


def make_verdict(**changes) -> Verdict:
    values = {
        "head": "h",
        "num_answers": 400,
        "constant": 0.6,
        "bad": 0.05,
        "constant_bad": 0.04,
        "garbled": 0.05,
        "looping": 0.0,
        "difference": Interval(0.01, -0.02, 0.04),
        "own_constant": 1.0,
        "win_rate": Interval(0.49, 0.47, 0.51),
    }
    return Verdict(**values | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"difference": Interval(0.02, -0.02, 0.05)}, None),
        ({"difference": Interval(0.021, -0.02, 0.05)}, "by above 0.02"),
        ({"difference": Interval(0.0, -0.06, 0.051)}, "reaches above 0.05"),
        ({"difference": Interval(0.0, None, None)}, "too few groups of prompts"),
        ({"num_answers": 399}, "399 answers to unseen kinds; 400 are needed"),
        ({"win_rate": Interval(0.48, 0.46, 0.499)}, "loses to the best constant"),
        ({"win_rate": Interval(0.48, None, None)}, "too few groups of its own prompts"),
    ],
)
def test_bounds(changes, reason):
    found = make_verdict(**changes).reasons
    assert not found if reason is None else len(found) == 1 and reason in found[0]


def test_the_table_fits_a_narrow_terminal():
    verdicts = [make_verdict(), make_verdict(head="other", difference=Interval(0.2, None, None))]
    console = Console(file=io.StringIO(), width=80)
    console.print(make_verdict_table(verdicts))
    text = console.file.getvalue()
    for shown in ("+0.010 [-0.020, +0.040]", "49.0% [47.0%, 51.0%]", "+0.200 (no interval)"):
        assert shown in text
    assert re.search(r"gate .* passed .* failed", text)


def test_a_packed_run_gets_the_same_verdict(tmp_path):
    run = write_run(tmp_path / "run", chat=0.2, own=0.2)
    pack_run(run, tmp_path / "packed")
    assert judge_run(tmp_path / "packed") == judge_run(run)
    size = {
        folder: sum(path.stat().st_size for path in (tmp_path / folder).rglob("*.jsonl*"))
        for folder in ("run", "packed")
    }
    assert size["packed"] < size["run"] / 4
    first = (tmp_path / "packed/outside/evaluation/answers/fixed-1.jsonl.gz").read_bytes()
    pack_run(run, tmp_path / "again")
    again = tmp_path / "again/outside/evaluation/answers/fixed-1.jsonl.gz"
    assert again.read_bytes() == first


def test_packing_mixes_no_runs(tmp_path):
    run = write_run(tmp_path / "run", chat=0.2, own=0.2)
    for target in (run, tmp_path):
        with pytest.raises(DataError, match="is not empty"):
            pack_run(run, target)
    assert len(judge_run(run)) == 1
    # Where an arm has both files, the one that is not packed counts.
    packed = run / "evaluation" / "answers" / "head-cautious.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}"))
    assert judge_run(run)[0].passes is False


def test_answers_are_judged_as_far_as_the_experiment_asks_for_them(tmp_path):
    """Training prompts beyond those that tune, and samples of an earlier setting, do not count."""
    run = write_run(tmp_path / "run", chat=0.1, own=0.2)
    expected = judge_run(run)
    for folder in (run, run / "outside"):
        with (folder / "prompts" / "train.jsonl").open("a") as file:
            task = "own" if folder == run else "chat"
            file.write(to_line(Prompt(f"{task}/train/999", task, text="?", group="more")))
        path = folder / "experiment.json"
        limited = json.loads(path.read_text())
        limited["evaluation"]["num_train_prompts"] = NUM_PROMPTS["train"]
        path.write_text(json.dumps(limited))
    answers = run / "outside" / "evaluation" / "answers" / "head-cautious.jsonl"
    first = json.loads(answers.read_text().splitlines()[0])
    with answers.open("a") as file:
        file.write(json.dumps(first | {"sample": 1, "text": "no no no no no no no no"}) + "\n")
    assert judge_run(run) == expected


def test_the_verdict_is_written_to_the_head_that_was_judged(tmp_path):
    run = write_run(tmp_path / "run", chat=0.1, own=0.2)
    heads = save_heads(tmp_path / "heads")
    folder = heads["tok"]
    for part in (run, run / "outside"):
        judged = {"cautious": {"identity": identify_head(folder)}}
        path = part / "evaluation" / "results.json"
        path.write_text(json.dumps({"heads": judged}))
    mark_head(folder, run, judge_run(run))
    assert read_metadata(folder).gate == "passed"
    with pytest.raises(DataError, match=r"no head that .* judged has its weights and settings"):
        mark_head(heads["seq"], run, judge_run(run))
    metadata = read_metadata(folder)
    write_metadata(folder, metadata.model_copy(update={"select": "mean"}))
    with pytest.raises(DataError, match=r"no head that .* judged has its weights and settings"):
        mark_head(folder, run, judge_run(run))


def test_what_cannot_be_judged_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"experiment\.json is missing; the run is not finished"):
        judge_run(tmp_path)
    run = write_run(tmp_path / "run", chat=0.1, own=0.2)
    answers = run / "evaluation" / "answers" / "head-cautious.jsonl"
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(DataError, match="head-cautious has no answer 0 to prompt own/test/0"):
        judge_run(run)
    answers.write_text("{}\n")
    with pytest.raises(DataError, match=r"head-cautious\.jsonl, line 1: prompt_id: Field required"):
        judge_run(run)
    results = run / "outside" / "evaluation" / "results.json"
    results.write_text(json.dumps({"heads": {"cautious": {"identity": "other"}}}))
    with pytest.raises(DataError, match="head cautious has changed between"):
        judge_run(run)
    results.unlink()
    with pytest.raises(DataError, match=r"results\.json is missing; the run is not finished"):
        judge_run(run)
    other = EXPERIMENT.look_outside()
    assert other is not None
    counting = TASK | {"rewards": {"good": {"kind": "number"}}}
    tasks = {"chat": TaskConfig.model_validate(counting)}
    results.write_text("{}")
    content = other.model_copy(update={"tasks": tasks}).model_dump_json()
    (run / "outside" / "experiment.json").write_text(content)
    with pytest.raises(DataError, match=r"outside\.chat: its first reward must be of kind fluency"):
        judge_run(run)
    shutil.rmtree(run / "outside")
    with pytest.raises(DataError, match="the run has no outside tasks"):
        judge_run(run)


def test_the_committed_answers_give_the_verdicts_that_the_heads_carry():
    verdicts = {verdict.head: verdict for verdict in judge_run(ROOT / "docs/results/shipped")}
    assert verdicts.keys() == SHIPPED_HEADS.keys()
    heads = FinishedEvaluation(ROOT / "docs/results/shipped").heads
    readme = (ROOT / "README.md").read_text()
    for name, verdict in verdicts.items():
        folder = SHIPPED_HEADS[name]
        assert read_metadata(folder).gate == ("passed" if verdict.passes else "failed")
        assert heads[name]["identity"] == identify_head(folder)
        (row,) = re.findall(rf"^\| `{name}`.*\|$", readme, re.MULTILINE)
        assert f"| {verdict.bad:.1%} |".replace("%", " %") in row


def test_a_verdict_needs_no_plots():
    """What `make serve` installs is enough."""
    code = "import sys; sys.modules['matplotlib'] = None; import adaptive_head.lpo.verdicts"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_S)
