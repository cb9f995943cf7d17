"""Feature probes from real, tiny models."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MiniCPM3Config, PreTrainedTokenizerFast

from adaptive_head import AdaptiveHead, HeadConfig, load_head, save_head
from adaptive_head.checkpoint import BaseModelIdentity
from adaptive_head.lpo.probing import TEXTS, ProbeStates, make_probe, read_probe_states
from adaptive_head.lpo.run import Run
from adaptive_head.probe import expect_temperatures, find_mismatch
from tests.heads import save_strong_head
from tests.test_cli import refusal
from tests.test_cli import run as run_command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that divides its last hidden state by 8 before the LM head, with a tokenizer."""
    folder = tmp_path_factory.mktemp("divided")
    config = MiniCPM3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        dim_model_base=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def states(model) -> ProbeStates:
    return read_probe_states(model)


@pytest.fixture
def head(model, tmp_path):
    config = HeadConfig(32, (0.0, 0.5, 1.0), (16,))
    return save_strong_head(tmp_path / "head", model, config, "token", 3)


def test_states_are_what_enters_the_lm_head_after_each_prompt(model, states):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    assert len(states.prompts) == len(TEXTS) == 8
    with torch.no_grad():
        for prompt, state in zip(states.prompts, states.precise, strict=True):
            output = loaded(torch.tensor([prompt]), output_hidden_states=True)
            expected = output.hidden_states[-1][0, -1] / 8
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
    assert states.precise.dtype == torch.float32 and states.rounded.dtype == torch.bfloat16
    torch.testing.assert_close(states.rounded.float(), states.precise, rtol=0.1, atol=0.05)


def test_a_probe_tells_the_trained_states_from_undivided_ones(head, states):
    network = load_head(head).network
    probe = make_probe(network, states)
    assert max(probe.temperatures) - min(probe.temperatures) > 0.1
    for dtype, tensor in (("float32", states.precise), ("bfloat16", states.rounded)):
        assert find_mismatch(probe, expect_temperatures(network, tensor), dtype) is None
        undivided = expect_temperatures(network, 8 * tensor)
        assert find_mismatch(probe, undivided, dtype) is not None
    assert network.layers[0].weight.dtype == torch.float32, "the head itself stays as it was"


def test_a_head_that_16_bits_change_more_has_a_wider_tolerance_for_them(head, states):
    network = load_head(head).network
    shaken = replace(states, rounded=states.rounded * 1.2)
    tolerances = make_probe(network, shaken).tolerances
    assert tolerances.keys() == {"float32", "float16", "bfloat16"}
    assert tolerances["float32"] < tolerances["bfloat16"] == tolerances["float16"]


def test_heads_of_a_model_too_large_for_float32_are_trained_without_a_probe(monkeypatch, capsys):
    def refuse(_folder):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("adaptive_head.lpo.run.read_probe_states", refuse)
    run = Run(experiment=None, model=SimpleNamespace(folder=Path("model")), folder=Path("out"))
    assert run.probe_states is None
    assert "no feature probe" in capsys.readouterr().err.replace("\n", " ")


def test_a_probe_is_added_to_a_head_that_exists(head, model, states):
    before = load_head(head)
    result = run_command("probe", head, model)
    assert result.exit_code == 0, result.stderr
    after = load_head(head)
    assert after.metadata.probe == make_probe(before.network, states)
    assert after.metadata.model_copy(update={"probe": None}) == before.metadata
    assert "now expects the temperatures" in result.stdout


def test_a_probe_of_another_model_is_refused(model, tmp_path):
    identity = BaseModelIdentity(name="other", fingerprint="0" * 16)
    network = AdaptiveHead(HeadConfig(32, (0.0, 0.5), (4,)))
    save_head(tmp_path / "head", network, level="token", base_model=identity, trained=False)
    assert "the head was made for other" in refusal("probe", tmp_path / "head", model)
