import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from adaptive_head.lpo.engine import Filters, Generation, GenerationRequest
from adaptive_head.lpo.records import DataError, Response, read_records
from adaptive_head.options import AdaptiveRequest
from tests.lpo.evaluation_setup import (
    FakeEngine,
    answer,
    decode,
    encode,
    make_experiment,
    make_prompts,
    run,
    save_heads,
)

# 5 fixed temperatures, 2 heads: prompts and samples of each arm with 4 prompts a task. Tuning arms
# answer 3 training prompts a task, of 4 controls for all tasks and those of the two heads.
NUM_TUNING = 4 * 5 * 12 + 5 * 12 + 5 * 6
NUM_FIRST = 5 * 16 + NUM_TUNING + 2 * 16 + 2 * 8
# Card, EDT, min-p, top-p; per head: min-p, MeanShift, the equal constant, shuffled, dealt.
NUM_CONTROLS = 4 * 16 + 5 * 16 + 4 * 8


def read_answers(folder: Path) -> dict[str, list[Response]]:
    files = sorted((folder / "evaluation" / "answers").glob("*.jsonl"))
    return {path.stem: list(read_records(path, Response)) for path in files}


def read_results(folder: Path) -> dict:
    return json.loads((folder / "evaluation" / "results.json").read_text())


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """They take longer than everything else; `test_report.py` looks at them."""
    monkeypatch.setattr("adaptive_head.lpo.evaluate.draw_plots", lambda results, folder: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished evaluation, not to be changed: its folder and the engine."""
    folder, engine = tmp_path_factory.mktemp("finished"), FakeEngine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptive_head.lpo.evaluate.draw_plots", lambda results, folder: [])
        run(folder, engine)
    return folder, engine


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished evaluation's folder."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_every_arm_answers_every_prompt_so_many_times(finished):
    folder, _ = finished
    answers = read_answers(folder)
    test = [(p.id, sample) for p in make_prompts("test", 4) for sample in (0, 1)]
    train = [(p.id, s) for p in make_prompts("train", 4) for s in (0, 1) if p.id[-1] != "3"]
    for name, responses in answers.items():
        expected = train if name.startswith("train-") else test
        if name.endswith("-seq"):
            expected = [key for key in expected if key[0].startswith("sums")]
        assert sorted(response.key for response in responses) == sorted(expected), name
    assert len(answers) == 5 + 6 * 5 + 4 + 4 + 5 + 4


def test_each_engine_start_serves_all_its_arms_in_one_call(finished):
    folder, engine = finished
    assert [len(call) for call in engine.calls] == [NUM_FIRST, NUM_CONTROLS]
    assert engine.starts == 2 * [{name: folder / "heads" / name for name in ("tok", "seq")}]
    arms = [request_id.split("|")[0] for request_id in engine.ids]
    assert arms == sorted(arms, key=arms.index)


def test_requests_are_what_the_arms_say(finished):
    _, engine = finished
    prompts = {prompt.id: prompt for prompt in make_prompts("test", 4)}
    for request in engine.get("fixed-0.3"):
        _, prompt_id, _ = request.id.split("|")
        assert request.prompt_token_ids == encode(prompts[prompt_id])
        assert request.max_tokens == (32 if prompt_id.startswith("sums") else 64)
        assert request.temperature == 0.3
    for name in ("tok", "seq"):
        for arm in (f"head-{name}", f"self-{name}"):
            assert {request.temperature for request in engine.get(arm)} == {
                AdaptiveRequest(head=name)
            }
    assert {request.temperature.policy for request in engine.get("entropy")} == {"entropy"}
    assert {request.filters.min_p > 0 for request in engine.get("min_p")} == {True}
    assert {request.temperature for request in engine.get("min_p")} == {1.0}
    own = engine.get("head_min_p-tok")
    assert {request.temperature for request in own} == {AdaptiveRequest(head="tok")}
    assert {request.filters.min_p > 0 for request in own} == {True}
    others = [r for call in engine.calls for r in call if "min_p" not in r.id]
    assert {request.filters.min_p for request in others} == {0.0}


def test_log_probabilities_are_kept(finished):
    folder, _ = finished
    for responses in read_answers(folder).values():
        for response in responses:
            assert response.logprobs == tuple(-0.1 - t for t in response.temperatures)


def test_arms_are_paired_by_seed_but_for_the_noise_floor(finished):
    _, engine = finished

    def list_seeds(arm: str) -> dict[str, int]:
        return {request.id.partition("|")[2]: request.seed for request in engine.get(arm)}

    seeds = list_seeds("fixed-0")
    assert len(set(seeds.values())) == 16
    for arm in ("fixed-0.9", "head-tok", "entropy", "meanshift-tok", "shuffled-tok", "card"):
        assert list_seeds(arm) == seeds
    for arm in ("head-seq", "meanshift-seq", "dealt-seq"):
        assert list_seeds(arm).items() <= seeds.items()
    assert not set(list_seeds("self-tok").values()) & set(seeds.values())


def test_meanshift_is_what_the_head_used_on_the_test_answers(finished):
    folder, engine = finished
    answers = read_answers(folder)["head-tok"]
    for task in ("sums", "stories"):
        temperatures = [t for r in answers if r.task == task for t in r.temperatures]
        mean = round(sum(temperatures) / len(temperatures), 6)
        assert mean not in (0.0, 0.9)
        used = {r.temperature for r in engine.get("meanshift-tok") if f"|{task}/" in r.id}
        assert used == {mean}
    answers = read_answers(folder)["head-seq"]
    mean = round(sum(r.temperatures[0] for r in answers) / len(answers), 6)
    assert 0 < mean < 0.6
    assert {r.temperature for r in engine.get("meanshift-seq")} == {mean}


def test_shuffled_temperatures_are_the_heads_own(finished):
    folder, engine = finished
    own = {response.key: response for response in read_answers(folder)["head-tok"]}
    for request in engine.get("shuffled-tok"):
        _, prompt_id, sample = request.id.split("|")
        temperatures = own[prompt_id, int(sample)].temperatures
        shuffled = request.temperature.list.temperatures[: len(temperatures)]
        assert Counter(shuffled) == Counter(temperatures)
    chosen = Counter(r.temperatures[0] for r in read_answers(folder)["head-seq"])
    assert Counter(r.temperature for r in engine.get("dealt-seq")) == chosen


def test_answers_are_scored(finished):
    folder, _ = finished
    for responses in read_answers(folder).values():
        for response in responses:
            if response.task == "sums":
                number = int(response.prompt_id.rsplit("/")[-1])
                assert response.scores == {
                    "correct": float(response.text == f"It is {2 * number}.")
                }
            else:
                assert response.scores.keys() == {"starts", "varied"}
                share = sum(part.startswith("She") for part in response.text.split(". ")) / 3
                assert response.scores["starts"] == pytest.approx(share)


def disagree(request: GenerationRequest) -> Generation:
    """On training prompts 0.6 is best for sums and 0.9 for stories; on test prompts neither."""
    prompt_id = decode(request.prompt_token_ids)
    task, split, number = prompt_id.split("/")
    best = {"sums": 0.6, "stories": 0.9}[task] if split == "train" else 0.0
    is_right = request.temperature == best and request.filters == Filters()
    temperature = request.temperature if isinstance(request.temperature, float) else 0.0
    if task == "sums":
        text = f"{2 * int(number) + (not is_right)}"
    else:
        text = "She ran. She sat." if is_right else "He ran. She sat."
    token_ids = tuple(map(ord, text))
    num = len(token_ids)
    return Generation(request.id, token_ids, (temperature,) * num, text, "stop", (-1.0,) * num)


def test_the_best_fixed_temperature_is_chosen_on_training_prompts_only(tmp_path):
    run(tmp_path, FakeEngine(disagree))
    results = read_results(tmp_path)
    assert results["tasks"]["sums"]["best_fixed"] == 0.6
    assert results["tasks"]["stories"]["best_fixed"] == 0.9
    for task, temperature, metric in (("sums", 0.6, 0.0), ("stories", 0.9, 0.5)):
        rows = results["heads"]["tok"]["tasks"][task]["rows"]
        (best,) = (row for row in rows if row["kind"] == "best_fixed")
        assert best["arm"] == f"fixed-{temperature}"
        # Its answers to the test prompts, where it is not the best.
        assert best["metric"]["mean"] == metric
        (zero,) = (row for row in rows if row["arm"] == "fixed-0" and row["kind"] == "fixed")
        assert zero["metric"]["mean"] == 1.0


def test_without_training_prompts_no_fixed_temperature_is_the_best(tmp_path):
    run(tmp_path, FakeEngine(), make_experiment(num_train_prompts=0))
    results = read_results(tmp_path)
    assert results["tasks"]["sums"]["best_fixed"] is results["best_fixed_overall"] is None
    kinds = {row["kind"] for row in results["heads"]["tok"]["tasks"]["sums"]["rows"]}
    constants = {"head", "fixed", "meanshift", "equal_surprisal", "card", "self"}
    assert kinds == constants | {"shuffled", "dealt", "entropy", "min_p", "top_p", "head_min_p"}


def test_only_the_controls_that_are_asked_for_are_paid_for(tmp_path):
    run(tmp_path, FakeEngine(), make_experiment(controls=["meanshift", "min_p"]))
    results = read_results(tmp_path)
    kinds = {row["kind"] for row in results["heads"]["tok"]["tasks"]["sums"]["rows"]}
    assert kinds == {"head", "fixed", "best_fixed", "best_fixed_overall", "meanshift", "min_p"}
    arms = {name.partition("-")[0] for name in results["arms"]}
    assert arms == {"head", "fixed", "train", "meanshift", "min_p"}
    assert "itself" not in (tmp_path / "evaluation" / "results.md").read_text()


@pytest.mark.parametrize("fail_after", [0, 1, 100, NUM_FIRST - 1])
def test_a_broken_off_evaluation_goes_on_where_it_was(tmp_path, finished, fail_after):
    folder = tmp_path / "again"
    heads = save_heads(folder / "heads")
    broken = FakeEngine(fail_after=fail_after)
    with pytest.raises(KeyboardInterrupt):
        run(folder, broken, heads=heads)
    assert sum(map(len, read_answers(folder).values())) == fail_after
    engine = FakeEngine()
    run(folder, engine, heads=heads)
    assert [len(call) for call in engine.calls] == [NUM_FIRST - fail_after, NUM_CONTROLS]
    check_same_answers(folder, finished[0])


def test_controls_go_on_where_they_were(tmp_path, finished):
    folder = tmp_path / "again"
    heads = save_heads(folder / "heads")
    with pytest.raises(KeyboardInterrupt):
        run(folder, FakeEngine(fail_after=NUM_FIRST - 3), heads=heads)
    # The first engine start has 3 answers left, fewer than the second's limit.
    with pytest.raises(KeyboardInterrupt):
        run(folder, FakeEngine(fail_after=10), heads=heads)
    engine = FakeEngine()
    run(folder, engine, heads=heads)
    assert [len(call) for call in engine.calls] == [NUM_CONTROLS - 10]
    check_same_answers(folder, finished[0])


def check_same_answers(folder: Path, other: Path) -> None:
    """Nothing is lost, nothing is there twice, and nothing is different."""
    answers, expected = read_answers(folder), read_answers(other)
    assert answers.keys() == expected.keys()
    for name, responses in answers.items():
        by_key = {response.key: response for response in responses}
        assert len(by_key) == len(responses), name
        assert by_key == {response.key: response for response in expected[name]}, name
    results, others = read_results(folder), read_results(other)
    assert results["heads"] == others["heads"]
    assert results["num_tokens"] == others["num_tokens"]


def test_a_torn_last_line_is_dropped(folder):
    path = folder / "evaluation" / "answers" / "fixed-0.3.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:50])
    engine = FakeEngine()
    run(folder, engine, heads=find_heads(folder))
    torn = [json.loads(line) for line in lines[7:]]
    expected = {f"fixed-0.3|{a['prompt_id']}|{a['sample']}" for a in torn}
    assert set(engine.ids) == expected
    assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


def find_heads(folder: Path) -> dict[str, Path]:
    return {name: folder / "heads" / name for name in ("tok", "seq")}


def test_a_damaged_line_is_an_error(folder):
    path = folder / "evaluation" / "answers" / "fixed-0.3.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"prompt_id": "sums/test/0"}\n'
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"fixed-0\.3\.jsonl, line 3"):
        run(folder, FakeEngine(), heads=find_heads(folder))


def test_an_answer_that_is_there_twice_is_an_error(folder):
    path = folder / "evaluation" / "answers" / "entropy.jsonl"
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(DataError, match="is there twice"):
        run(folder, FakeEngine(), heads=find_heads(folder))


def test_a_finished_evaluation_starts_no_engine(folder):
    before = read_results(folder)
    engine = FakeEngine()
    run(folder, engine, heads=find_heads(folder))
    assert engine.starts == []
    assert read_results(folder) == before


@pytest.mark.parametrize(("changed", "value"), [("seed", 6), ("name", "other")])
def test_other_settings_start_over(finished, folder, changed, value):
    _, first = finished
    engine = FakeEngine()
    experiment = make_experiment().model_copy(update={changed: value})
    run(folder, engine, experiment, heads=find_heads(folder))
    assert sorted(engine.ids) == sorted(first.ids)
    assert {r.seed for call in engine.calls for r in call}.isdisjoint(
        {r.seed for call in first.calls for r in call}
    )
    seeds = {r.seed for responses in read_answers(folder).values() for r in responses}
    assert seeds == {request.seed for call in engine.calls for request in call}


def test_another_head_is_asked_anew_and_the_others_are_not(tmp_path, folder):
    heads = find_heads(folder)
    heads["seq"] = save_heads(tmp_path / "other", seed=1)["seq"]

    def answer_otherwise(request: GenerationRequest) -> Generation:
        generation = answer(request)
        if request.temperature != AdaptiveRequest(head="seq"):
            return generation
        return replace(generation, temperatures=(0.6,) * len(generation.token_ids))

    engine = FakeEngine(answer_otherwise)
    run(folder, engine, heads=heads)
    arms = {request_id.split("|")[0] for request_id in engine.ids}
    tuning = {arm for arm in arms if arm.startswith("train-head_min_p") and arm.endswith("-seq")}
    own = {"head-seq", "self-seq", "meanshift-seq", "dealt-seq", "head_min_p-seq"}
    assert (len(tuning), arms - tuning - {"equal_surprisal-seq"}) == (5, own)
    assert {r.temperature for r in engine.get("meanshift-seq")} == {0.6}


def test_more_responses_keep_those_that_there_are(folder):
    engine = FakeEngine()
    run(folder, engine, make_experiment(num_responses=3), heads=find_heads(folder))
    first = [request.id for request in engine.calls[0]]
    assert len(first) == (NUM_FIRST - NUM_TUNING) // 2
    assert all(request_id.endswith("|2") for request_id in first)


def test_seeds_and_streams_are_answered_and_counted_together(tmp_path):
    experiment = make_experiment(num_training_seeds=2, num_streams=3, num_train_prompts=1)
    engine = FakeEngine()
    run(tmp_path, engine, experiment)
    answers = read_answers(tmp_path)
    assert len(answers["fixed-0"]) == 4 * 2 * 2 * 3
    assert len(answers["head-tok"]) == len(answers["head-tok+2"]) == len(answers["fixed-0"])
    assert engine.starts[0].keys() == {"tok", "tok+2", "seq", "seq+2"}
    results = read_results(tmp_path)
    assert list(results["heads"]) == ["tok", "seq"]
    assert results["heads"]["tok"]["trained"] == [True, True]
    own, *_, noise = results["heads"]["seq"]["tasks"]["sums"]["rows"]
    scores = [r.scores["correct"] for name in ("seq", "seq+2") for r in answers[f"head-{name}"]]
    assert own["metric"]["mean"] == pytest.approx(sum(scores) / len(scores))
    assert noise["kind"] == "self"
    # Each training seed has controls of its own.
    assert answers.keys() >= {"meanshift-seq+2", "dealt-tok+2", "head_min_p-tok+2"}


def test_two_evaluations_of_one_folder_are_refused(tmp_path):
    answers = tmp_path / "evaluation" / "answers"
    answers.mkdir(parents=True)
    with FileLock(answers / ".lock"), pytest.raises(DataError, match="another process"):
        run(tmp_path, FakeEngine())


@pytest.mark.parametrize("content", ["{", '{"arms": {}}', "[]"])
def test_a_damaged_key_file_is_an_error_and_deletes_nothing(folder, content):
    path = folder / "evaluation" / "answers" / "key.json"
    path.write_text(content)
    before = read_answers(folder)
    with pytest.raises(DataError, match=r"key\.json"):
        run(folder, FakeEngine(), heads=find_heads(folder))
    assert read_answers(folder) == before


def test_time_and_tokens_add_up_over_runs(tmp_path):
    heads = save_heads(tmp_path / "heads")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FakeEngine(fail_after=50), heads=heads)
    key_file = tmp_path / "evaluation" / "answers" / "key.json"
    content = json.loads(key_file.read_text())
    assert content["seconds"] > 0
    key_file.write_text(json.dumps(content | {"seconds": 1000.0}))
    run(tmp_path, FakeEngine(), heads=heads)
    results = read_results(tmp_path)
    assert results["num_seconds"] >= 1000
    answers = read_answers(tmp_path)
    assert results["num_tokens"] == sum(len(r.token_ids) for a in answers.values() for r in a)


def test_the_order_of_prompts_and_answers_does_not_matter(tmp_path, finished):
    def shuffle(requests):
        asked = list(requests)
        random.Random(0).shuffle(asked)
        return map(answer, asked)

    engine = FakeEngine()
    engine.generate = shuffle
    run(tmp_path / "again", engine)
    results, expected = read_results(tmp_path / "again"), read_results(finished[0])
    assert results["heads"] == expected["heads"]
