import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from adaptive_head import cli, load_head
from adaptive_head.checkpoint import BaseModelIdentity, save_head, write_metadata
from adaptive_head.embedded_model import ModelPreparationError
from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.head import AdaptiveHead, HeadConfig


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 12}')
    save_file({"embed.weight": torch.ones(4, 12)}, folder / "model.safetensors")
    return folder


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    # Only a SystemExit is left by a command that explains its errors.
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def make(tmp_path, model, *arguments):
    result = run("init", tmp_path / "head", "--model", model, "--layers", "8", *arguments)
    assert result.exit_code == 0, result.stderr
    return load_head(tmp_path / "head")


def refusal(*arguments) -> str:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("adaptive-head: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_init_writes_an_untrained_head_for_the_model(tmp_path, model):
    head = make(tmp_path, model)
    assert not head.metadata.trained
    assert head.metadata.config == HeadConfig(12, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (8,))
    assert head.level == "token"
    assert head.metadata.base_model == BaseModelIdentity(
        name="tiny-model", fingerprint=fingerprint_model(model)
    )


def test_init_writes_a_head_that_is_close_to_uniform(tmp_path, model):
    network = make(tmp_path, model).network
    hidden = torch.randn(32, 12, generator=torch.Generator().manual_seed(0)) * 5
    assert (network(hidden).softmax(dim=-1) - 1 / 6).abs().max() < 0.02


def test_init_takes_the_paper_s_layers_if_not_told_otherwise(tmp_path, model):
    result = run("init", tmp_path / "head", "--model", model)
    assert result.exit_code == 0
    assert load_head(tmp_path / "head").metadata.layer_sizes == (2048, 2048)


def test_init_does_what_its_options_say(tmp_path, model):
    options = ["--temperatures", "0, 0.5,2", "--level", "sequence", "--seed", "9"]
    options += ["--name", "Tiny", "--hidden-size", "20", "--layers", "4,6"]
    head = make(tmp_path, model, *options)
    assert head.metadata.config == HeadConfig(20, (0.0, 0.5, 2.0), (4, 6))
    assert (head.level, head.metadata.base_model.name) == ("sequence", "Tiny")
    expected = AdaptiveHead(head.metadata.config, seed=9)
    assert torch.equal(head.network.layers[0].weight, expected.layers[0].weight)


def test_init_can_make_a_linear_head(tmp_path, model):
    assert make(tmp_path, model, "--layers", "").metadata.layer_sizes == ()


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": {"hidden_size": 24}},
        {"hidden_size": None, "text_config": {"hidden_size": 24}},
        {"hidden_size": 24, "text_config": {"hidden_size": 3}},
    ],
)
def test_init_finds_the_hidden_size(tmp_path, model, config):
    (model / "config.json").write_text(json.dumps(config))
    assert make(tmp_path, model).metadata.hidden_size == 24


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ("organisation/model", "organisation/model"),
        ("model", "model"),
        ("", "tiny-model"),
        (None, "tiny-model"),
        ("/home/someone/model", "tiny-model"),
        ("./model", "tiny-model"),
        ("~/model", "tiny-model"),
        ("folder/inside/another", "tiny-model"),
        ("C:\\models\\model", "tiny-model"),
    ],
)
def test_init_names_the_model_and_no_path(tmp_path, model, published, expected):
    (model / "config.json").write_text(json.dumps({"hidden_size": 12, "_name_or_path": published}))
    assert make(tmp_path, model).metadata.base_model.name == expected
    assert str(tmp_path) not in (tmp_path / "head" / "head.json").read_text()


def test_init_says_when_the_model_has_no_fingerprint(tmp_path, model):
    (model / "model.safetensors").unlink()
    result = run("init", tmp_path / "head", "--model", model, "--layers", "8")
    assert result.exit_code == 0
    assert "no safetensors" in result.stderr
    assert load_head(tmp_path / "head").metadata.base_model.fingerprint is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--temperatures", "0,warm"], "--temperatures must be numbers"),
        (["--temperatures", "0,"], "--temperatures must be numbers"),
        (["--temperatures", "1,0"], "strictly increasing"),
        (["--temperatures", "0,nan"], "nan is not in [0, 10]"),
        (["--temperatures", ""], "got 0"),
        (["--layers", "8,2.5"], "--layers must be numbers"),
        (["--layers", "0"], "must be positive"),
    ],
)
def test_init_refuses_impossible_options(tmp_path, model, options, complaint):
    assert complaint in refusal("init", tmp_path / "head", "--model", model, *options)
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    "options", [["--level", "word"], ["--hidden-size", "0"], ["--seed", "-1"], ["--seed", "x"]]
)
def test_init_refuses_options_of_the_wrong_kind(tmp_path, model, options):
    assert run("init", tmp_path / "head", "--model", model, *options).exit_code == 2


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{}", "has no hidden_size; give it as --hidden-size"),
        ('{"hidden_size": "12"}', "has no hidden_size"),
        ('{"hidden_size": true}', "has no hidden_size"),
        ('{"text_config": 12}', "has no hidden_size"),
        ("{", "is not readable JSON"),
        ("[]", "must hold a JSON object"),
        (None, "it has no config.json"),
    ],
)
def test_init_refuses_a_folder_that_is_no_model(tmp_path, model, content, complaint):
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    assert complaint in refusal("init", tmp_path / "head", "--model", model)


def test_init_refuses_a_damaged_model(tmp_path, model):
    (model / "model.safetensors").write_bytes(b"short")
    refusal("init", tmp_path / "head", "--model", model)


def test_init_overwrites_nothing(tmp_path, model):
    make(tmp_path, model)
    message = refusal("init", tmp_path / "head", "--model", model, "--layers", "8")
    assert "is not an empty folder" in message


def test_init_refuses_a_place_it_cannot_write_to(tmp_path, model):
    (tmp_path / "file").write_text("")
    refusal("init", tmp_path / "file" / "head", "--model", model, "--layers", "8")


def test_show_prints_what_is_known(tmp_path, model):
    make(tmp_path, model, "--name", "Tiny [bold]")
    result = run("show", tmp_path / "head")
    assert result.exit_code == 0
    for part in ("Tiny [bold]", fingerprint_model(model), "0, 0.2, 0.4", "12 → 8 → 6", "158", "no"):
        assert part in result.stdout


def test_show_prints_json(tmp_path, model):
    head = make(tmp_path, model)
    result = run("show", tmp_path / "head", "--json")
    assert json.loads(result.stdout) == json.loads(head.metadata.model_dump_json())


def test_show_prints_how_a_head_was_trained(tmp_path):
    network = AdaptiveHead(HeadConfig(4, (0.0, 1.0), ()))
    identity = BaseModelIdentity(name="tiny")
    save_head(
        tmp_path / "h",
        network,
        level="token",
        base_model=identity,
        trained=True,
        training={"beta": 0.1},
    )
    assert '{"beta": 0.1}' in run("show", tmp_path / "h").stdout


def test_show_refuses_what_is_not_a_head(tmp_path, model):
    assert "[bold] is not a head" in refusal("show", tmp_path / "[bold]")
    make(tmp_path, model)
    (tmp_path / "head" / "head.safetensors").write_bytes(b"")
    assert "is damaged or truncated" in refusal("show", tmp_path / "head")


def test_model_prints_the_folder_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "prepare", lambda: tmp_path)
    assert run("model").stdout == f"{tmp_path}\n"


@pytest.mark.parametrize("error", [ModelPreparationError("No network."), OSError("No\nspace.")])
def test_model_explains_why_there_is_none(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(cli, "prepare", fail)
    assert refusal("model") == f"adaptive-head: {' '.join(str(error).split())}\n"


def test_errors_are_red_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[31m" in run("show", tmp_path / "nowhere").stderr


def test_the_command_is_main(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["adaptive-head", "show", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "is not a head" in capsys.readouterr().err


def test_upgrade_rewrites_format_1_and_says_so(tmp_path, model):
    folder = make(tmp_path, model).path
    path = folder / "head.json"
    content = json.loads(path.read_text()) | {"format_version": 1}
    content["temperatures"] = content.pop("choices")
    for field in ("kind", "select", "abstain", "probe", "gate"):
        del content[field]
    path.write_text(json.dumps(content))
    result = run("upgrade", folder, "--output", tmp_path / "new")
    assert result.stdout == f"Wrote {folder} in format 2 to {tmp_path / 'new'}\n"
    assert json.loads(path.read_text()) == content
    assert run("upgrade", folder).stdout == f"{folder} had format 1, and has format 2 now\n"
    assert path.read_bytes() == (tmp_path / "new/head.json").read_bytes()
    assert run("upgrade", folder).stdout == f"{folder} has format 2 already\n"


def test_set_changes_what_a_head_does_by_default(tmp_path, model):
    folder = make(tmp_path, model).path
    weights = (folder / "head.safetensors").read_bytes()
    result = run("set", folder, "--select", "mean", "--abstain-below", "0.25", "--fallback", "0.6")
    sentence = "abstain 0.6 where its probability is below 0.25"
    assert result.stdout == f"{folder} now has select mean, {sentence}\n"
    assert load_head(folder).abstain.parameters == (0.25, 0.6, 1.0)
    # What is not named stays as it is.
    run("set", folder, "--statistic", "margin")
    head = load_head(folder)
    assert (head.select, head.abstain.parameters) == ("mean", (0.25, 0.6, 0.0))
    assert "0.6 where its margin is below 0.25" in run("show", folder).stdout
    run("set", folder, "--no-abstain")
    assert load_head(folder).abstain is None
    assert (folder / "head.safetensors").read_bytes() == weights


@pytest.mark.parametrize("arguments", [["--select", "mean"], ["--no-abstain"]])
def test_set_drops_the_verdict_of_a_head_that_it_changes(tmp_path, model, arguments):
    folder = make(tmp_path, model).path
    run("set", folder, "--abstain-below", "0.25", "--fallback", "0.6")
    judged = load_head(folder).metadata.model_copy(update={"gate": "passed"})
    write_metadata(folder, judged)
    run("set", folder, "--select", judged.select, "--fallback", "0.6")
    assert load_head(folder).metadata.gate == "passed", "nothing has changed"
    run("set", folder, *arguments)
    assert load_head(folder).metadata.gate is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--abstain-below", "0.25"], "head.json: abstain.fallback: Field required"),
        (["--fallback", "0.5"], "head.json: abstain.threshold: Field required"),
        (
            ["--abstain-below", "1.5", "--fallback", "1"],
            "head.json: abstain.threshold: Input should",
        ),
        (
            ["--abstain-below", "0.5", "--fallback", "11"],
            "head.json: abstain.fallback: Input should",
        ),
        (["--no-abstain", "--fallback", "1"], "--no-abstain does not go with"),
        ([], "say what to change"),
    ],
)
def test_set_refuses_what_a_head_cannot_do_and_changes_nothing(
    tmp_path, model, arguments, complaint
):
    folder = make(tmp_path, model).path
    before = (folder / "head.json").read_bytes()
    assert complaint in refusal("set", folder, *arguments)
    assert (folder / "head.json").read_bytes() == before


def test_upgrade_refuses_what_is_no_head_or_no_empty_folder(tmp_path, model):
    assert "is not a head: it has no head.json" in refusal("upgrade", tmp_path)
    folder = make(tmp_path, model).path
    assert "is not an empty folder" in refusal("upgrade", folder, "--output", model)
