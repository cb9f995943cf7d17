import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MiniCPM3Config,
    PhiConfig,
)

from adaptive_head.lpo import frozen_model
from adaptive_head.lpo.feature_file import FeatureFile, Features, load_features
from adaptive_head.lpo.features import compute_features, find_choices, make_key
from adaptive_head.lpo.frozen_model import FrozenModel, read_unembedding
from adaptive_head.lpo.records import DataError, Response
from adaptive_head.options import Level
from tests.engine.tiny_model import HIDDEN_SIZE, VOCAB_SIZE, make_tiny_model
from tests.processors import PROCESSORS, WITHOUT_BFLOAT16, run_on

TEMPERATURES = (0.0, 0.3, 1.0, 1.7)
# bfloat16 has 8 bits: half a unit in the last place is 2^-9.
ROUNDING = {"rtol": 2**-8, "atol": 1e-5}
CLOSE = {"rtol": 1e-4, "atol": 1e-3}
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def answer(
    prompt_id: str, sample: int, num_prompt: int, num_tokens: int, vocab: int = VOCAB_SIZE
) -> Response:
    """A response of random tokens at random temperatures, the same every time."""
    generator = torch.Generator().manual_seed(hash((num_prompt, num_tokens, sample)) % 2**31)

    def draw(high: int, size: int) -> list[int]:
        return torch.randint(high, (size,), generator=generator).tolist()

    return Response(
        prompt_id=prompt_id,
        task=prompt_id.split("/")[0],
        sample=sample,
        seed=0,
        prompt_token_ids=tuple(draw(vocab, num_prompt)),
        token_ids=tuple(draw(vocab, num_tokens)),
        temperatures=tuple(TEMPERATURES[i] for i in draw(len(TEMPERATURES), num_tokens)),
        text="",
        finish_reason="stop",
    )


RESPONSES = [
    answer("a/0", 0, 5, 7),
    answer("a/0", 1, 5, 1),
    answer("a/1", 0, 1, 12),
    answer("b/0", 3, 9, 4),
    answer("b/0", 0, 30, 20),
]


def even(response: Response) -> Response:
    """The response as a sequence-level head samples it: at one temperature."""
    return replace(response, temperatures=response.temperatures[:1] * len(response.token_ids))


def compute(model: Path, folder: Path, level: Level = "token", **changes: Any) -> Features:
    arguments: dict[str, Any] = {"responses": RESPONSES, "temperatures": TEMPERATURES} | changes
    return compute_features(model, level=level, folder=folder, progress=False, **arguments)


def refer(
    folder: Path, response: Response, temperatures: tuple[float, ...] = TEMPERATURES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, d] and logprobs [tokens, K] by the obvious way: one sequence, all its
    logits, a softmax per token and temperature."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        output = model(
            torch.tensor([[*response.prompt_token_ids, *response.token_ids]]),
            output_hidden_states=True,
        )
    # What MiniCPM3 divides by before its output layer; Granite divides the logits instead.
    is_divided = model.config.model_type == "minicpm3"
    divisor = model.config.logits_scaling if is_divided else 1.0
    before = len(response.prompt_token_ids)
    logprobs = torch.full((len(response.token_ids), len(temperatures)), -math.inf)
    for index, token in enumerate(response.token_ids):
        logits = output.logits[0, before - 1 + index].double()
        for column, temperature in enumerate(temperatures):
            if temperature:
                logprobs[index, column] = (logits / temperature).log_softmax(0)[token]
            elif logits.argmax() == token:
                logprobs[index, column] = 0.0
    return output.hidden_states[-1][0, before - 1 : -1] / divisor, logprobs


def continue_greedily(folder: Path, response: Response) -> Response:
    """The response with tokens that are the likeliest, each after those before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokens = list(response.prompt_token_ids)
    with torch.no_grad():
        for _ in response.token_ids:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return replace(response, token_ids=tuple(tokens[len(response.prompt_token_ids) :]))


def get_rows(features: Features, response: Response) -> slice:
    return slice(*features.starts[response.key])


def test_rows_are_those_of_one_plain_forward_pass_each(model, tmp_path):
    responses = [*RESPONSES, replace(continue_greedily(model, RESPONSES[0]), sample=9)]
    features = compute(model, tmp_path, responses=responses)
    assert features.temperatures == TEMPERATURES
    assert features.hidden.dtype == torch.bfloat16 and features.logprobs.dtype == torch.float32
    assert features.choices.dtype == features.token_ids.dtype == torch.int64
    assert features.hidden.shape == (sum(len(r.token_ids) for r in responses), HIDDEN_SIZE)
    assert features.starts.keys() == {r.key for r in responses}
    for response in responses:
        hidden, logprobs = refer(model, response)
        rows = get_rows(features, response)
        torch.testing.assert_close(features.hidden[rows].float(), hidden, **ROUNDING)
        torch.testing.assert_close(features.logprobs[rows], logprobs, **CLOSE)
        assert features.token_ids[rows].tolist() == list(response.token_ids)
        chosen = [TEMPERATURES[i] for i in features.choices[rows]]
        assert chosen == list(response.temperatures)


def test_responses_share_the_rows_out_among_them(model, tmp_path):
    starts = compute(model, tmp_path).starts
    taken = sorted(row for start, stop in starts.values() for row in range(start, stop))
    assert taken == list(range(sum(len(r.token_ids) for r in RESPONSES)))


def test_rows_do_not_depend_on_the_order_of_the_responses(model, tmp_path):
    one = compute(model, tmp_path / "one")
    other = compute(model, tmp_path / "other", responses=RESPONSES[::-1])
    assert one.starts == other.starts
    assert torch.equal(one.hidden, other.hidden) and torch.equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_logprobs_that_nobody_reads_are_nan(model, tmp_path, level):
    responses = [even(response) for response in RESPONSES]
    whole = compute(model, tmp_path, level, responses=responses)
    less = compute(model, tmp_path, level, responses=responses, needs_logprobs=False)
    assert less.logprobs.shape == whole.logprobs.shape and less.logprobs.isnan().all()
    assert not whole.logprobs.isnan().any()
    assert torch.equal(less.hidden, whole.hidden) and torch.equal(less.choices, whole.choices)
    assert less.starts == whole.starts


def test_at_temperature_zero_only_the_likeliest_token_is_possible(model, tmp_path):
    greedy = continue_greedily(model, RESPONSES[3])
    other = replace(greedy, sample=4, token_ids=(greedy.token_ids[0] ^ 1, *greedy.token_ids[1:]))
    features = compute(model, tmp_path, responses=[greedy, other])
    assert features.logprobs[get_rows(features, greedy), 0].tolist() == [0.0] * 4
    assert features.logprobs[get_rows(features, other), 0][0] == -math.inf
    assert features.logprobs[:, 1:].isfinite().all()


@pytest.mark.parametrize("batch_tokens", [1, 20, 64])
def test_padding_and_company_change_nothing(model, tmp_path, batch_tokens):
    together = compute(model, tmp_path / "one")
    apart = compute(model, tmp_path / "many", batch_tokens=batch_tokens)
    assert together.starts == apart.starts
    torch.testing.assert_close(together.hidden.float(), apart.hidden.float(), **ROUNDING)
    torch.testing.assert_close(together.logprobs, apart.logprobs, **CLOSE)
    assert torch.equal(together.choices, apart.choices)


def test_batches_keep_to_their_limit(monkeypatch, model, tmp_path):
    shapes = []
    read = FrozenModel.read

    def record(self: Any, batch: list[Response], *rest: Any) -> Any:
        lengths = [len(r.prompt_token_ids) + len(r.token_ids) - 1 for r in batch]
        shapes.append((len(batch), max(lengths)))
        return read(self, batch, *rest)

    monkeypatch.setattr(FrozenModel, "read", record)
    compute(model, tmp_path, batch_tokens=24)
    # The longest is alone, though it exceeds the limit; (9 + 4 - 1) * 2 fit exactly.
    assert shapes == [(1, 49), (2, 12), (2, 11)]


def test_logits_come_in_chunks_without_a_seam(monkeypatch, model, tmp_path):
    whole = compute(model, tmp_path / "whole")
    monkeypatch.setattr(frozen_model, "_CHUNK_ELEMENTS", 3 * VOCAB_SIZE)
    chunked = compute(model, tmp_path / "chunked")
    torch.testing.assert_close(whole.logprobs, chunked.logprobs, **CLOSE)


def test_sequence_level_row_is_the_prompt_s_last_state_and_the_sum(model, tmp_path):
    greedy = replace(continue_greedily(model, RESPONSES[0]), sample=9)
    responses = [even(r) for r in (*RESPONSES, greedy)]
    of_tokens = compute(model, tmp_path / "token", responses=responses)
    features = compute(model, tmp_path / "sequence", "sequence", responses=responses)
    assert len(features.hidden) == len(responses) and not features.token_ids.any()
    for response in responses:
        (row,) = range(*features.starts[response.key])
        rows = get_rows(of_tokens, response)
        assert torch.equal(features.hidden[row], of_tokens.hidden[rows][0])
        expected = of_tokens.logprobs[rows].sum(dim=0)
        torch.testing.assert_close(features.logprobs[row], expected, **CLOSE)
        assert features.choices[row] == of_tokens.choices[rows][0]
    (row,) = range(*features.starts[greedy.key])
    assert features.logprobs[row, 0] == 0.0


def make_model(folder: Path, config: Any) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


ODD_MODELS: dict[str, Callable[[], Any]] = {
    "capped": lambda: Gemma2Config(**COMMON, final_logit_softcapping=3.0),
    "scaled": lambda: GraniteConfig(**COMMON, logits_scaling=4.0),
    "biased": lambda: PhiConfig(**{k: v for k, v in COMMON.items() if k != "head_dim"}),
}
PLAIN_MODELS: dict[str, Callable[[], Any]] = {
    "tied": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "divided": lambda: MiniCPM3Config(
        **{k: v for k, v in COMMON.items() if k != "head_dim"},
        dim_model_base=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "positions": lambda: GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


@pytest.mark.parametrize("kind", [*ODD_MODELS, *PLAIN_MODELS])
def test_logits_are_the_model_s_own_whatever_its_family(tmp_path, kind):
    folder = make_model(tmp_path / "model", (ODD_MODELS | PLAIN_MODELS)[kind]())
    if kind == "biased":
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.nn.init.normal_(loaded.lm_head.bias)
        loaded.save_pretrained(folder)
    responses = [answer("a/0", n, 4 + n, 5 + 3 * n, vocab=96) for n in range(3)]
    features = compute(folder, tmp_path, responses=responses)
    for response in responses:
        hidden, logprobs = refer(folder, response)
        rows = get_rows(features, response)
        torch.testing.assert_close(features.hidden[rows].float(), hidden, **ROUNDING)
        torch.testing.assert_close(features.logprobs[rows], logprobs, **CLOSE)
    if kind in ODD_MODELS:
        with pytest.raises(DataError, match="not a product of hidden state and output layer"):
            read_unembedding(folder)
    else:
        unembedding = read_unembedding(folder)
        tokens = torch.tensor(response.token_ids).unsqueeze(1)
        expected = (hidden @ unembedding.T / 0.3).log_softmax(1).gather(1, tokens).squeeze(1)
        torch.testing.assert_close(expected, logprobs[:, 1], **CLOSE)
        assert not unembedding.is_inference() and not unembedding.requires_grad


@pytest.fixture
def half(tmp_path, model):
    """The model, as a checkpoint in bfloat16."""
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half"
    )
    return tmp_path / "half"


def test_a_model_that_goes_around_its_output_layer_is_refused(model, monkeypatch):
    frozen = FrozenModel(model)
    frozen.read_states([1, 2])
    monkeypatch.setattr(frozen._model, "forward", lambda **_: None)
    with pytest.raises(DataError, match="does not call its output layer"):
        frozen.read_states([1, 2])


def test_model_runs_in_its_checkpoint_s_dtype(tmp_path, model, half, monkeypatch):
    run_on(monkeypatch, "Sapphire Rapids")
    features = compute(half, tmp_path)
    hidden, _ = refer(half, RESPONSES[4])
    precise, _ = refer(model, RESPONSES[4])
    found = features.hidden[get_rows(features, RESPONSES[4])].float()
    assert hidden.dtype == torch.bfloat16
    error = (found - hidden.float()).abs().mean()
    assert error < 0.3 * (found - precise).abs().mean()
    assert read_unembedding(half).dtype == torch.bfloat16


def test_without_bfloat16_instructions_the_model_runs_in_float32(
    tmp_path, model, half, monkeypatch
):
    run_on(monkeypatch, "Cascade Lake")
    frozen = FrozenModel(half)
    assert frozen.unembedding.dtype == torch.float32
    ((_, hidden, _),) = frozen.read([RESPONSES[4]], (0.0, 1.0), True)
    assert hidden.dtype == torch.float32
    rounded = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    rounded.save_pretrained(tmp_path / "rounded")
    expected, _ = refer(tmp_path / "rounded", RESPONSES[4])
    torch.testing.assert_close(hidden, expected, **CLOSE)


def test_features_in_float32_are_not_taken_for_the_checkpoints(half, monkeypatch):
    settings = (half, RESPONSES, "token", (0.0, 1.0))
    keys = {}
    for processor in PROCESSORS:
        run_on(monkeypatch, processor)
        keys[processor] = make_key(*settings)
    without = {keys[processor] for processor in WITHOUT_BFLOAT16}
    assert len(without) == 1 and len(set(keys.values())) == 2


def forbid_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(FrozenModel, "__init__", refuse)


def test_cache_is_used_again_whatever_the_order(monkeypatch, model, tmp_path):
    first = compute(model, tmp_path)
    forbid_the_model(monkeypatch)
    again = compute(model, tmp_path, responses=RESPONSES[::-1])
    assert again.starts == first.starts and again.temperatures == first.temperatures
    for name in ("hidden", "choices", "logprobs", "token_ids"):
        assert torch.equal(getattr(again, name), getattr(first, name))


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "fewer": lambda: {"responses": RESPONSES[1:]},
    "token": lambda: {
        "responses": [
            *RESPONSES[1:],
            replace(RESPONSES[0], token_ids=(*RESPONSES[0].token_ids[:-1], 11)),
        ]
    },
    "prompt": lambda: {
        "responses": [*RESPONSES[1:], replace(RESPONSES[0], prompt_token_ids=(3, 4))]
    },
    "choice": lambda: {"responses": [even(r) for r in RESPONSES]},
    # Its place in the order of the keys stays.
    "sample": lambda: {
        "responses": [*RESPONSES[:2], replace(RESPONSES[2], sample=1), *RESPONSES[3:]]
    },
    "less": lambda: {"needs_logprobs": False},
    "temperatures": lambda: {"temperatures": (*TEMPERATURES, 2.0)},
    "level": lambda: {"level": "sequence", "responses": [RESPONSES[1]]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_have_another_key(model, change):
    settings = {"responses": RESPONSES, "level": "token", "temperatures": TEMPERATURES}
    if change == "level":
        settings["responses"] = [RESPONSES[1]]
    assert make_key(model, **settings) != make_key(model, **settings | CHANGES[change]())


def test_other_weights_have_another_key(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    assert make_key(other, RESPONSES, "token", (0.0, 1.0)) == make_key(
        model, RESPONSES, "token", (0.0, 1.0)
    )
    loaded = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        loaded.model.embed_tokens.weight[0] += 1
    loaded.save_pretrained(other)
    assert make_key(other, RESPONSES, "token", (0.0, 1.0)) != make_key(
        model, RESPONSES, "token", (0.0, 1.0)
    )


def test_changed_settings_are_computed_beside_the_old_cache(monkeypatch, model, tmp_path):
    compute(model, tmp_path)
    fewer = compute(model, tmp_path, responses=RESPONSES[:2])
    assert fewer.starts.keys() == {r.key for r in RESPONSES[:2]}
    forbid_the_model(monkeypatch)
    assert len(compute(model, tmp_path).starts) == len(RESPONSES)


def find_cache(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_cache_that_is_not_whole_is_computed_again(model, tmp_path, kept):
    before = compute(model, tmp_path).hidden.clone()
    path = find_cache(tmp_path)
    content = path.read_bytes()[:kept]
    path.unlink()
    path.write_bytes(content)
    assert load_features(tmp_path, path.stem) is None
    assert torch.equal(compute(model, tmp_path).hidden, before)


def test_cache_of_another_key_is_not_taken_for_its_own(model, tmp_path):
    compute(model, tmp_path)
    path = find_cache(tmp_path)
    path.rename(tmp_path / "0123456789abcdef.safetensors")
    assert load_features(tmp_path, "0123456789abcdef") is None


def test_interrupted_computation_leaves_no_cache(monkeypatch, model, tmp_path):
    original = FeatureFile.write
    written = []

    def write(self: Any, response: Response, **rows: Any) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(response)
        original(self, response, **rows)

    monkeypatch.setattr(FeatureFile, "write", write)
    with pytest.raises(OSError, match="No space left"):
        compute(model, tmp_path)
    assert len(written) == 3 and list(tmp_path.iterdir()) == []


def test_killed_computation_is_no_obstacle(model, tmp_path):
    expected = compute(model, tmp_path / "clean")
    partial = f"{find_cache(tmp_path / 'clean').name}.partial"
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / partial).write_bytes(b"\xff" * 10_000_000)
    features = compute(model, tmp_path / "killed")
    assert torch.equal(features.hidden, expected.hidden)
    assert [path.suffix for path in (tmp_path / "killed").iterdir()] == [".safetensors"]


def test_cache_is_an_ordinary_safetensors_file(model, tmp_path):
    features = compute(model, tmp_path)
    with safe_open(find_cache(tmp_path), framework="np") as file:
        assert set(file.keys()) == {"hidden", "choices", "logprobs", "token_ids"}
        assert (file.get_tensor("token_ids") == features.token_ids.numpy()).all()
        assert json.loads(file.metadata()["temperatures"]) == list(TEMPERATURES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": (0.3, 0.31, 1.0, 1.7)}, r"temperature 0\.31 is not one of 0, 0\.3, 1,"),
        ({"token_ids": (1, 2, VOCAB_SIZE, 3)}, f"token {VOCAB_SIZE} is not one of the model's"),
        ({"prompt_token_ids": (VOCAB_SIZE + 5,)}, f"token {VOCAB_SIZE + 5} is not one"),
        ({"token_ids": (), "temperatures": ()}, "the response has no tokens"),
        ({"prompt_token_ids": ()}, "the prompt has no tokens"),
    ],
)
def test_response_that_cannot_be_used_is_named(model, tmp_path, changes, message):
    wrong = replace(RESPONSES[3], **changes)
    with pytest.raises(DataError, match=f"prompt b/0, sample 3: .*{message}"):
        compute(model, tmp_path, responses=[*RESPONSES[:3], wrong])
    assert not list(tmp_path.iterdir())


def test_same_response_twice_is_refused(model, tmp_path):
    with pytest.raises(DataError, match="prompt a/0, sample 1: the response is there twice"):
        compute(model, tmp_path, responses=[*RESPONSES, RESPONSES[1]])


def test_sequence_level_response_has_one_temperature():
    response = replace(RESPONSES[3], temperatures=(0.3, 0.3, 1.0, 0.3))
    with pytest.raises(DataError, match=r"prompt b/0, sample 3: .* one temperature, not several"):
        find_choices(response, "sequence", TEMPERATURES)
    assert find_choices(response, "token", TEMPERATURES) == [1, 1, 2, 1]
    assert find_choices(even(response), "sequence", TEMPERATURES) == [1]


def test_temperatures_are_compared_as_the_worker_rounds_them():
    response = replace(RESPONSES[1], temperatures=(0.333333,))
    assert find_choices(response, "token", (0.0, 1 / 3)) == [1]


def test_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither"):
        compute(tmp_path / "missing", tmp_path)


def test_bar_is_drawn_on_stderr_if_asked_for(model, tmp_path, capfd):
    compute_features(model, RESPONSES, "token", TEMPERATURES, tmp_path)
    captured = capfd.readouterr()
    assert "features" in captured.err and "5/5" in captured.err and captured.out == ""
