import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adaptive_head.checkpoint import (
    MAX_METADATA_BYTES,
    MAX_WEIGHTS_BYTES,
    BaseModelIdentity,
    FeatureProbe,
    HeadError,
    HeadMetadata,
    load_head,
    read_metadata,
    save_head,
    write_metadata,
)
from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.heads import SHIPPED_HEADS
from adaptive_head.metadata import Setting

CONFIG = HeadConfig(8, (0.0, 0.5, 1.0), (6, 4))
IDENTITY = BaseModelIdentity(name="tiny", fingerprint="0123456789abcdef")


@pytest.fixture
def network() -> AdaptiveHead:
    return AdaptiveHead(CONFIG, seed=4)


@pytest.fixture
def folder(tmp_path, network):
    folder = tmp_path / "head"
    save_head(folder, network, level="token", base_model=IDENTITY, trained=False)
    return folder


def change_json(folder, **changes) -> None:
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, **changes) -> None:
    """Replace tensors by name (dots written as __), or remove them with None."""
    weights = load_file(folder / "head.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "head.safetensors")


def refusal(folder, **kwargs) -> str:
    with pytest.raises(HeadError) as caught:
        load_head(folder, **kwargs)
    return str(caught.value)


def test_a_head_comes_back_bit_for_bit(folder, network):
    loaded = load_head(folder).network
    assert loaded.config == CONFIG
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].view(torch.int32), tensor.view(torch.int32))


def test_the_metadata_comes_back(tmp_path, network):
    training = {"method": "lpo", "beta": 0.1, "steps": [1, 2]}
    saved = save_head(
        tmp_path / "h",
        network,
        level="sequence",
        base_model=IDENTITY,
        trained=True,
        training=training,
    )
    loaded = load_head(tmp_path / "h")
    assert loaded.metadata == saved == read_metadata(tmp_path / "h")
    assert (loaded.level, loaded.path) == ("sequence", tmp_path / "h")
    assert (saved.trained, saved.training, saved.base_model) == (True, training, IDENTITY)
    assert saved.config == CONFIG
    assert {"python", "torch"} <= saved.packages.keys()


def test_a_loaded_head_is_ready_to_serve(folder):
    network = load_head(folder).network
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())


def test_a_folder_holds_the_two_files_and_nothing_else(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["head.json", "head.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_become_float32(folder, network, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "head.safetensors")
    for name, tensor in load_head(folder).network.state_dict().items():
        assert torch.equal(tensor, tensors[name].float())


def test_the_right_model_is_accepted(folder):
    load_head(folder, hidden_size=8, fingerprint=IDENTITY.fingerprint)


def test_a_head_without_a_fingerprint_goes_with_any_model_of_its_width(tmp_path, network):
    anonymous = BaseModelIdentity(name="tiny")
    save_head(tmp_path / "h", network, level="token", base_model=anonymous, trained=False)
    load_head(tmp_path / "h", hidden_size=8, fingerprint="fedcba9876543210")


def test_a_model_of_another_width_is_refused(folder):
    message = refusal(folder, hidden_size=16)
    assert str(folder) in message
    assert "width 8" in message
    assert "have 16" in message


def test_another_model_is_refused(folder):
    message = refusal(folder, fingerprint="fedcba9876543210")
    assert str(folder) in message
    for part in ("tiny", "0123456789abcdef", "fedcba9876543210"):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"layers__0__weight": torch.full((6, 8), torch.nan)}, "layers.0.weight holds NaN"),
        ({"layers__2__bias": torch.tensor([0, torch.inf, 0])}, "layers.2.bias holds NaN or inf"),
        (
            {"layers__0__bias": torch.full((6,), 1e300, dtype=torch.float64)},
            "layers.0.bias holds NaN or infinity",
        ),
        ({"layers__1__bias": None}, "missing layers.1.bias"),
        ({"layers__1__bias": None, "layers__0__bias": None}, "missing layers.0.bias, layers.1.bi"),
        ({"layers__3__bias": torch.zeros(3)}, "unknown layers.3.bias"),
        ({"surprise": torch.zeros(1)}, "unknown surprise"),
        ({"layers__0__weight": torch.zeros(8, 6)}, "has shape [8, 6], head.json says [6, 8]"),
        ({"layers__2__bias": torch.zeros(4)}, "has shape [4], head.json says [3]"),
        ({"layers__0__weight": torch.zeros(6, 8, dtype=torch.int32)}, "torch.int32, not a float"),
        ({"layers__0__weight": torch.zeros(6, 8, dtype=torch.bool)}, "torch.bool, not a float"),
        (
            {"layers__0__weight": torch.zeros(6, 8, dtype=torch.complex64)},
            "torch.complex64, not a float",
        ),
    ],
)
def test_wrong_weights_are_refused(folder, changes, complaint):
    change_weights(folder, **changes)
    message = refusal(folder)
    assert str(folder / "head.safetensors") in message
    assert complaint in message


@pytest.mark.parametrize(
    "num_bytes", [0, 1, 7, 8, 9, 60, 300, -300, -100, -8, -1], ids=lambda n: f"{n}"
)
def test_a_truncated_weights_file_is_refused(folder, num_bytes):
    path = folder / "head.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert f"{path} is damaged or truncated" in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"garbage " * 20, b"\xff" * 64, b"\x80\x02}q\x00." * 9, b"\0" * 64]
)
def test_a_file_of_another_kind_is_refused(folder, content):
    path = folder / "head.safetensors"
    path.write_bytes(content)
    assert f"{path} is damaged or truncated" in refusal(folder)


def test_missing_weights_are_refused(folder):
    (folder / "head.safetensors").unlink()
    assert refusal(folder) == f"{folder} is not a head: it has no head.safetensors"


def test_a_folder_without_metadata_is_not_a_head(folder, tmp_path):
    (folder / "head.json").unlink()
    assert refusal(folder) == f"{folder} is not a head: it has no head.json"
    assert "is not a head" in refusal(tmp_path / "nowhere")


PROBE = {
    "prompts": [[1, 2, 3], [4]],
    "temperatures": [0.25, 0.75],
    "tolerances": {"float32": 0.01, "bfloat16": 0.05},
}
REQUIRED = ["choices", "level", "hidden_size", "layer_sizes", "base_model", "trained"]


@pytest.mark.parametrize("field", [*REQUIRED, "created", "packages"])
def test_metadata_without_a_required_field_is_refused(folder, field):
    path = folder / "head.json"
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))
    assert refusal(folder) == f"{path}: {field}: Field required"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"base_model": {"name": "tiny", "path": "/x"}}, "base_model.path: Extra inputs"),
        ({"base_model": {}}, "base_model.name: Field required"),
        ({"format_version": 3}, "has format 3; this release reads up to 2: install a newer one"),
        ({"format_version": 0}, "format_version"),
        ({"format_version": "one"}, "format_version"),
        ({"level": "sentence"}, "level"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"layer_sizes": [6, 0]}, "layer_sizes.1"),
        ({"layer_sizes": 6}, "layer_sizes"),
        ({"choices": [0.5]}, "choices: temperatures: 2 to 64 are needed"),
        ({"choices": [1.0, 0.5, 0.0]}, "strictly increasing"),
        ({"choices": [0.0, 0.5, float("nan")]}, "nan is not in [0, 10]"),
        ({"choices": [0.0, 0.5, 11]}, "11.0 is not in [0, 10]"),
        ({"trained": "perhaps"}, "trained"),
        ({"choices": [0.0, "0.5", 1.0]}, "choices.1: must be a number, or an object with temp"),
        ({"choices": [0.0, True, 1.0]}, "choices.1: must be a number, or an object with temp"),
        ({"choices": [0.0, {"top_p": 0.9}, 1.0]}, "choices.1.temperature: Field required"),
        ({"choices": [0.0, {"temperature": 0.5, "top_k": 4}, 1.0]}, "choices.1.top_k: Extra"),
        ({"choices": [0.0, {"temperature": 0.5, "top_p": 0}, 1.0]}, "choices.1.top_p: "),
        ({"choices": [0.0, {"temperature": 0.5, "min_p": 2}, 1.0]}, "choices.1.min_p: "),
        ({"choices": [0.1 * i for i in range(65)]}, "choices: temperatures: 2 to 64"),
        ({"layer_sizes": [6] * 65}, "layer_sizes: Tuple should have at most 64"),
        ({"select": "maximum"}, "select: "),
        ({"abstain": {"threshold": 0.5}}, "abstain.fallback: Field required"),
        ({"temperatures": [0.0, 0.5, 1.0]}, "temperatures: Extra inputs"),
        ({"probe": {"prompts": [[1]], "temperatures": [0.5]}}, "probe.tolerances: Field required"),
        ({"probe": PROBE | {"prompts": [[1], [2, -1]]}}, "probe.prompts.1.1: "),
        ({"probe": PROBE | {"prompts": [[1], []]}}, "probe.prompts.1: "),
        ({"probe": PROBE | {"prompts": [[1]] * 65}}, "probe.prompts: "),
        ({"probe": PROBE | {"prompts": [[1], [1] * 257]}}, "probe.prompts.1: "),
        ({"probe": PROBE | {"temperatures": [0.5]}}, "probe: 1 temperatures for 2 prompts"),
        ({"probe": PROBE | {"temperatures": [0.5, 11]}}, "probe.temperatures.1: "),
        ({"probe": PROBE | {"tolerances": {}}}, "probe.tolerances: "),
        ({"probe": PROBE | {"tolerances": {"float32": 0}}}, "probe.tolerances.float32: "),
    ],
)
def test_wrong_metadata_is_refused(folder, changes, complaint):
    change_json(folder, **changes)
    message = refusal(folder)
    assert str(folder / "head.json") in message
    assert complaint in message


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": 9}, "layers.0.weight has shape [6, 8], head.json says [6, 9]"),
        ({"layer_sizes": [6]}, "unknown layers.2.bias, layers.2.weight"),
        ({"layer_sizes": [6, 4, 4]}, "missing layers.3.bias, layers.3.weight"),
        ({"choices": [0.0, 1.0]}, "layers.2.bias has shape [3], head.json says [2]"),
        # Sizes that no memory holds.
        ({"hidden_size": 10**13}, "head.json says [6, 10000000000000]"),
        ({"hidden_size": 10**30}, "layers.0.weight has shape [6, 8]"),
    ],
)
def test_metadata_that_disagrees_with_the_weights_is_refused(folder, changes, complaint):
    change_json(folder, **changes)
    message = refusal(folder)
    assert str(folder / "head.safetensors") in message
    assert complaint in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not readable JSON"),
        (b'{"format_version": 1, "temperatures": [0.0', "is not readable JSON"),
        (b"{format_version: 1}", "is not readable JSON"),
        (b"\xff\xfe{}", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"[]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
    ],
    ids=["empty", "truncated", "unquoted", "not-utf-8", "deep", "list", "null"],
)
def test_metadata_that_is_not_a_json_object_is_refused(folder, content, complaint):
    path = folder / "head.json"
    path.write_bytes(content)
    assert refusal(folder).startswith(f"{path} {complaint}")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": "autodeco"}, 'kind: this release serves heads of kind "categorical", not'),
        ({"kind": None}, 'kind: this release serves heads of kind "categorical", not None'),
        (
            {"choices": [0.0, {"temperature": 0.5, "min_p": 0.1}, 1.0]},
            "choices: this release serves choices of temperatures only, and number 1 has a min_p",
        ),
        (
            {"choices": [0.0, 0.5, {"temperature": 1.0, "top_p": 0.9}]},
            "choices: this release serves choices of temperatures only, and number 2 has a top_p",
        ),
    ],
)
def test_what_this_release_cannot_serve_is_refused_and_never_ignored(folder, changes, complaint):
    change_json(folder, **changes)
    assert complaint in refusal(folder)
    with pytest.raises(HeadError):
        read_metadata(folder)


def test_a_choice_is_a_number_or_an_object(folder):
    change_json(folder, choices=[0, {"temperature": 0.5}, 1.0])
    metadata = load_head(folder).metadata
    assert metadata.temperatures == (0.0, 0.5, 1.0)
    assert metadata.choices[1] == Setting(temperature=0.5)


PROBABILITIES = st.none() | st.floats(0.001, 1.0)


@given(st.floats(0.0, 10.0), PROBABILITIES, PROBABILITIES)
def test_a_setting_is_written_as_short_as_it_is(temperature, top_p, min_p):
    setting = Setting(temperature=temperature, top_p=top_p, min_p=min_p)
    written = json.loads(setting.model_dump_json())
    others = {"top_p": top_p, "min_p": min_p}
    given_ones = {name: value for name, value in others.items() if value is not None}
    assert written == ({"temperature": temperature} | given_ones if given_ones else temperature)
    assert Setting.model_validate(written) == setting


def test_the_heads_own_select_and_probe_come_back(tmp_path, network):
    probe = FeatureProbe.model_validate(PROBE)
    options = {"base_model": IDENTITY, "trained": False, "select": "mean"}
    metadata = save_head(tmp_path / "h", network, level="token", **options)
    write_metadata(tmp_path / "h", metadata.model_copy(update={"probe": probe}))
    loaded = load_head(tmp_path / "h")
    assert loaded.select == loaded.metadata.select == "mean" and loaded.metadata.probe == probe
    assert json.loads((tmp_path / "h/head.json").read_text())["probe"] == PROBE


def test_files_that_are_too_large_are_refused_before_they_are_read(folder):
    weights, path = folder / "head.safetensors", folder / "head.json"
    # Sparse: nothing of that size is on the disk.
    os.truncate(weights, MAX_WEIGHTS_BYTES + 1)
    assert f"{weights} cannot be read: it has 1,073,741,825 bytes" in refusal(folder)
    os.truncate(path, MAX_METADATA_BYTES + 1)
    assert f"{path} cannot be read: it has 1,048,577 bytes, and at most 1,048,576" in refusal(
        folder
    )


def test_what_would_be_too_large_to_read_is_not_written(folder):
    before = (folder / "head.json").read_bytes()
    metadata = read_metadata(folder)
    for training, complaint in [
        ({"note": "x" * MAX_METADATA_BYTES}, "training is too long"),
        (nest(300), "training cannot be written"),
    ]:
        with pytest.raises(HeadError, match=complaint):
            write_metadata(folder, metadata.model_copy(update={"training": training}))
    assert (folder / "head.json").read_bytes() == before


def nest(depth: int) -> dict:
    return {"deeper": nest(depth - 1)} if depth else {}


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{folder / name} cannot be read: it is not a regular file" in refusal(folder)


def describe_head(**fields) -> HeadMetadata:
    defaults = {"level": "token", "hidden_size": 8, "layer_sizes": (), "base_model": IDENTITY}
    defaults |= {"trained": True, "created": "", "packages": {}}
    return HeadMetadata.model_validate(defaults | fields)


@pytest.mark.parametrize("select", ["argmax", "sample"])
def test_a_head_that_chooses_is_counted_by_its_choices(select):
    metadata = describe_head(choices=(0.0, 0.35, 2.5), select=select)
    assert not metadata.is_continuous and metadata.bounds == (0.0, 0.35, 2.5)


def test_a_head_that_serves_means_is_counted_in_buckets():
    metadata = describe_head(choices=(0.0, 0.35, 2.5), select="mean")
    grid = [float(f"0.{tenth}") for tenth in range(10)] + [float(f"1.{t}") for t in range(10)]
    assert metadata.is_continuous
    assert metadata.bounds == tuple(sorted([*grid, 2.0, 0.35, 2.5]))


ABSTAIN = {"threshold": 0.4, "fallback": 0.6, "statistic": "margin"}


def test_a_head_that_may_abstain_is_read_again(folder):
    change_json(folder, abstain=ABSTAIN)
    head = load_head(folder)
    assert head.abstain.parameters == (0.4, 0.6, 0.0)
    assert head.metadata.model_dump(mode="json")["abstain"] == ABSTAIN


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"threshold": 1.01}, "abstain.threshold: Input should be less than or equal to 1"),
        ({"threshold": -0.1}, "abstain.threshold: Input should be greater than or equal to 0"),
        ({"fallback": 10.5}, "abstain.fallback: Input should be less than or equal to 10"),
        ({"fallback": None}, "abstain.fallback: Input should be a valid number"),
        ({"statistic": "entropy"}, "abstain.statistic: Input should be 'margin' or 'probability'"),
        ({"surprise": 1}, "abstain.surprise: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_abstention_is_refused_with_its_field(folder, changes, complaint):
    change_json(folder, abstain=ABSTAIN | changes)
    assert f"head.json: {complaint}" in refusal(folder)


def test_a_fallback_is_counted_and_leaves_no_shares_of_training():
    training = {"temperature_shares": {"0.0": 0.25, "1.0": 0.75}}
    head = describe_head(choices=(0.0, 1.0), abstain=ABSTAIN, training=training)
    assert head.bounds == (0.0, 0.6, 1.0)
    assert head.training_shares is None
    means = describe_head(choices=(0.0, 1.0), select="mean", abstain=ABSTAIN | {"fallback": 3.5})
    assert means.bounds[-2:] == (2.0, 3.5)


def test_shares_of_training_are_those_of_what_is_served():
    chosen = {"0.0": 0.25, "1.0": 0.75}
    means = {str(tenth / 10): 0.0 for tenth in range(21)} | {"0.4": 0.5, "0.5": 0.5}
    training = {"temperature_shares": chosen, "expected_temperature_shares": means}
    shares = {
        select: describe_head(choices=(0.0, 1.0), select=select, training=training).training_shares
        for select in ("argmax", "mean", "sample")
    }
    assert shares["argmax"] == (0.25, 0.75) and shares["sample"] is None
    assert shares["mean"] == (0, 0, 0, 0, 0.5, 0.5, *[0] * 15)
    # What the likeliest were says nothing of means.
    training = {"temperature_shares": chosen}
    for select in ("mean", "sample"):
        assert (
            describe_head(choices=(0, 1), select=select, training=training).training_shares is None
        )


def test_nothing_is_overwritten(folder, network):
    before = (folder / "head.safetensors").read_bytes()
    with pytest.raises(HeadError, match="is not an empty folder"):
        save_head(folder, network, level="token", base_model=IDENTITY, trained=True)
    assert (folder / "head.safetensors").read_bytes() == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, network):
    (tmp_path / "h").write_text("precious")
    with pytest.raises(HeadError, match="is not an empty folder"):
        save_head(tmp_path / "h", network, level="token", base_model=IDENTITY, trained=False)
    assert (tmp_path / "h").read_text() == "precious"


def test_an_empty_folder_and_its_parents_are_used(tmp_path, network):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        save_head(folder, network, level="token", base_model=IDENTITY, trained=False)
        load_head(folder)


def test_weights_that_are_not_finite_are_not_written(tmp_path, network):
    with torch.no_grad():
        network.layers[1].bias[0] = torch.nan
    with pytest.raises(HeadError, match=r"layers\.1\.bias holds NaN"):
        save_head(tmp_path / "h", network, level="token", base_model=IDENTITY, trained=False)
    assert not list((tmp_path / "h").iterdir())


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(30, 8, generator=generator),
        "model.layers.0.mlp.weight": torch.randn(16, 8, generator=generator),
        "model.norm.weight": torch.randn(8, generator=generator),
        "model.scale": torch.tensor(0.125),
    }


def fingerprint_of(folder, **files) -> str | None:
    """Fingerprint of a new folder with one safetensors file a keyword."""
    folder.mkdir()
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return fingerprint_model(folder)


@pytest.fixture
def expected(tmp_path) -> str:
    fingerprint = fingerprint_of(tmp_path / "plain", model=make_tensors())
    assert fingerprint is not None
    return fingerprint


def test_a_fingerprint_is_16_hexadecimal_digits(expected):
    assert len(expected) == 16
    assert int(expected, 16) >= 0


def test_float32_and_bfloat16_have_the_same_fingerprint(tmp_path, expected):
    halved = {name: tensor.bfloat16() for name, tensor in make_tensors().items()}
    assert fingerprint_of(tmp_path / "bf16", model=halved) == expected


def test_shards_have_the_fingerprint_of_the_single_file(tmp_path, expected):
    names = list(make_tensors())
    shards = {
        "model-00001-of-00002": {name: make_tensors()[name] for name in names[1:3]},
        "model-00002-of-00002": {name: make_tensors()[name] for name in (names[0], names[3])},
    }
    assert fingerprint_of(tmp_path / "sharded", **shards) == expected


def test_a_tied_lm_head_does_not_count(tmp_path, expected):
    tied = make_tensors() | {"lm_head.weight": torch.ones(30, 8)}
    assert fingerprint_of(tmp_path / "tied", model=tied) == expected


@pytest.mark.parametrize("name", list(make_tensors()))
def test_a_changed_weight_changes_the_fingerprint(tmp_path, expected, name):
    tensors = make_tensors()
    tensors[name].view(-1)[0] += 0.5
    assert fingerprint_of(tmp_path / "tuned", model=tensors) != expected


def test_a_renamed_removed_or_reshaped_tensor_changes_the_fingerprint(tmp_path, expected):
    renamed, removed, reshaped = make_tensors(), make_tensors(), make_tensors()
    renamed["model.final_norm.weight"] = renamed.pop("model.norm.weight")
    del removed["model.norm.weight"]
    reshaped["model.layers.0.mlp.weight"] = reshaped["model.layers.0.mlp.weight"][:8].clone()
    found = [
        fingerprint_of(tmp_path / f"other{index}", model=tensors)
        for index, tensors in enumerate((renamed, removed, reshaped))
    ]
    assert len({expected, *found}) == 4


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.zeros(0),
        torch.zeros(0, 4),
        torch.ones(4, 2, dtype=torch.bool),
        torch.ones(4, 2, dtype=torch.uint8),
        torch.ones(4, 2).to(torch.float8_e4m3fn),
        torch.ones(2, 3, 4, 5),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_every_kind_of_tensor_has_a_fingerprint(tmp_path, tensor):
    assert fingerprint_of(tmp_path / "odd", model={"odd": tensor})


def test_without_safetensors_there_is_no_fingerprint(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert fingerprint_model(tmp_path) is None
    assert fingerprint_model(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("training", "shares"),
    [
        ({"temperature_shares": {"0.0": 0.5, "0.5": 0.25, "1.0": 0.25}}, (0.5, 0.25, 0.25)),
        ({"temperature_shares": {"0.0": 0, "0.5": 1, "1.0": 0}}, (0, 1, 0)),
        ({"temperature_shares": {"0.0": 0.5, "0.5": 0.5}}, None),
        ({"temperature_shares": {"0.0": 0.9, "0.5": 0.9, "1.0": 0.9}}, None),
        ({"temperature_shares": {"0.0": "many", "0.5": 1, "1.0": 0}}, None),
        ({"temperature_shares": [0.5, 0.25, 0.25]}, None),
        ({}, None),
        (None, None),
    ],
)
def test_what_was_chosen_in_training_is_read_where_it_is_said(folder, training, shares):
    change_json(folder, training=training)
    assert read_metadata(folder).training_shares == shares


@pytest.mark.parametrize("name", SHIPPED_HEADS)
def test_the_heads_that_ship_have_the_newest_format(name):
    written = json.loads((SHIPPED_HEADS[name] / "head.json").read_text())
    assert written == load_head(SHIPPED_HEADS[name]).metadata.model_dump(mode="json")


@pytest.mark.parametrize("name", SHIPPED_HEADS)
def test_the_heads_that_ship_say_what_they_chose_in_training(name):
    metadata = read_metadata(SHIPPED_HEADS[name])
    always_choosing = metadata.model_copy(update={"select": "argmax", "abstain": None})
    assert sum(always_choosing.training_shares) == pytest.approx(1)
