"""Configurations and heads for a benchmark that downloads nothing."""

import json

import pytest
import torch

from adaptive_head import load_head
from benchmarks.models import PRESETS, write_config, write_heads

TEMPERATURES = (0.0, 0.5, 1.0)


def test_a_preset_is_written_by_its_name(tmp_path):
    write_config("llama-3-8b", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config == PRESETS["llama-3-8b"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (
        4096,
        32,
        128256,
    )


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_configuration_is_found_by_its_folder_or_its_path(tmp_path, name):
    config = {"architectures": ["GPT2LMHeadModel"], "n_embd": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_config(str(tmp_path / name), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ("[]", "names architectures"),
        ('{"hidden_size": 64}', "names architectures"),
        ('{"architectures": []}', "names architectures"),
    ],
)
def test_what_is_no_configuration_is_refused_by_its_name(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        write_config(str(path), tmp_path / "model")
    assert str(path) in str(error.value)
    assert not (tmp_path / "model").exists()


def test_an_unknown_name_is_answered_with_those_that_there_are(tmp_path):
    with pytest.raises(ValueError, match="llama-3-9b: neither") as error:
        write_config("llama-3-9b", tmp_path / "model")
    assert all(name in str(error.value) for name in PRESETS)


@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize("layer_sizes", [(), (32, 32)])
def test_heads_choose_all_of_their_temperatures(tmp_path, layer_sizes, scale):
    folders = {name: tmp_path / name for name in ("a", "b")}
    write_heads(folders, 64, layer_sizes, TEMPERATURES, "sequence")
    heads = {name: load_head(folder) for name, folder in folders.items()}
    hidden = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * scale
    choices = {name: head.network(hidden).argmax(dim=-1) for name, head in heads.items()}
    for name, head in heads.items():
        assert head.network.config.layer_sizes == layer_sizes
        assert head.metadata.level == "sequence"
        assert set(choices[name].tolist()) == {0, 1, 2}
    assert (choices["a"] != choices["b"]).any()
