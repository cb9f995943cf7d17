import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm
import yaml
from vllm.platforms import current_platform

from adaptive_head import AdaptiveHead, HeadConfig, load_head, save_head
from adaptive_head.checkpoint import BaseModelIdentity, read_metadata
from adaptive_head.dtype import choose_dtype
from adaptive_head.embedded_model import prepare
from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.heads import SHIPPED_HEADS
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from adaptive_head.vllm.limits import DEFAULT_MAX_QUEUED, Limits
from adaptive_head.vllm.settings import read_settings
from server import cli, shutdown
from server.heads import choose_default
from tests.engine.tiny_model import HIDDEN_SIZE, make_tiny_model
from tests.processors import PROCESSORS, WITHOUT_BFLOAT16, run_on
from tests.programs import HANG_S

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def heads(tmp_path_factory, model) -> Path:
    """A folder with heads for the model, `foreign` for another one, and what is no head."""
    folder = tmp_path_factory.mktemp("heads")
    own = fingerprint_model(model)
    network = AdaptiveHead(HeadConfig(HIDDEN_SIZE, (0.0, 1.0), (4,)))
    for name, fingerprint in {"a": own, "b": own, "foreign": "0" * 16}.items():
        identity = BaseModelIdentity(name="tiny", fingerprint=fingerprint)
        save_head(folder / name, network, level="token", base_model=identity, trained=False)
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "head.json").write_text("{")
    return folder


@pytest.fixture
def served(monkeypatch) -> list[Namespace]:
    """What would have been served."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    calls: list[Namespace] = []
    monkeypatch.setattr(ServeSubcommand, "cmd", calls.append)
    # main changes these; set here, they are restored.
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return calls


@pytest.fixture
def serve(served):
    def run(*arguments) -> Namespace:
        cli.main([str(argument) for argument in arguments])
        return served.pop()

    return run


@pytest.fixture
def refusal(served, capsys):
    """The sentence with which a command line is refused."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        assert caught.value.code == 2
        assert not served
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("adaptive-serve: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def test_another_minor_of_vllm_is_refused_before_anything_of_it_is_imported(refusal, monkeypatch):
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 34, 0))
    assert "this release needs vLLM 0.32 or 0.33, found vLLM 0.34.0" in refusal()


def settings_of(args):
    return read_settings(args.additional_config)


def test_vllm_serves_the_model_with_our_worker_and_scheduler(serve, model, heads):
    args = serve(model, "--head", heads / "a", "--port", 8123)
    assert (args.model_tag, args.port) == (str(model), 8123)
    assert (args.worker_cls, args.scheduler_cls) == (WORKER_CLS, SCHEDULER_CLS)


def test_a_head_is_named_after_its_folder_or_as_asked(serve, model, heads):
    options = (f"--head={heads / 'a'}", "--head", f"careful={heads / 'b'}/")
    settings = settings_of(serve(model, *options))
    assert settings.heads == {"a": heads / "a", "careful": heads / "b"}
    assert settings.default_head is None


def test_heads_may_be_relative_to_the_folder_or_the_home(serve, model, heads, monkeypatch):
    monkeypatch.chdir(heads)
    monkeypatch.setenv("HOME", str(heads.parent))
    options = ("--head", "a", "--head", f"b=~/{heads.name}/b", "--head", "c=./a/../b")
    expected = {"a": heads / "a", "b": heads / "b", "c": heads / "b"}
    assert settings_of(serve(model, *options)).heads == expected


@pytest.mark.parametrize("second", ["{}/a", "a={}/b", "={}/b", "/"])
def test_two_heads_of_a_name_or_one_without_are_refused(refusal, model, heads, second):
    second = second.format(heads)
    sentence = refusal(model, "--head", heads / "a", "--head", second)
    assert f"--head {second}: name it apart, with NAME=DIR" in sentence


@pytest.mark.parametrize("folder", ["gone", "empty", "damaged"])
def test_a_folder_that_is_no_head_is_refused_by_name(refusal, model, heads, folder):
    assert str(heads / folder) in refusal(model, "--head", heads / folder)


def test_a_head_for_another_model_is_refused_unless_the_user_knows_better(
    refusal, serve, model, heads
):
    assert "0000000000000000" in refusal(model, "--head", heads / "foreign")
    args = serve(model, "--head", heads / "foreign", "--no-verify-base")
    assert settings_of(args).verify_base is False


def test_a_head_for_a_model_of_the_hub_is_left_to_the_engine(serve, heads):
    args = serve("org/model", "--head", heads / "foreign")
    assert settings_of(args).verify_base is True


def test_the_default_head_is_one_of_the_heads(refusal, serve, model, heads):
    options = (model, "--head", heads / "a", "--head", heads / "b", "--default-head")
    assert settings_of(serve(*options, "b")).default_head == "b"
    assert "(a, b)" in refusal(*options, "c")
    assert "(none)" in refusal(model, "--default-head", "c")


@pytest.fixture
def admin_key(monkeypatch):
    monkeypatch.setenv("ADAPTIVE_ADMIN_KEY", "open-sesame-please")


def test_the_playground_can_be_left_out(serve, model):
    assert settings_of(serve(model)).playground is True
    assert settings_of(serve(model, "--no-playground")).playground is False


def test_without_a_key_the_server_is_this_machines_own(serve, model, monkeypatch):
    assert serve(model).host == "127.0.0.1"
    assert serve(model, "--host=0.0.0.0").host == "0.0.0.0"
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert serve(model).host == "127.0.0.1"
    monkeypatch.setenv("VLLM_API_KEY", "key")
    # vLLM's default: all addresses.
    assert serve(model).host is None
    assert serve(model, "--host=127.0.0.2").host == "127.0.0.2"
    monkeypatch.delenv("VLLM_API_KEY")
    assert serve(model, "--api-key=key").host is None


def test_metrics_need_the_key_unless_the_operator_says_otherwise(serve, model):
    assert settings_of(serve(model)).metrics_without_key is False
    assert settings_of(serve(model, "--metrics-without-key")).metrics_without_key is True


def test_heads_cannot_be_changed_by_default(serve, model):
    args = serve(model)
    assert settings_of(args).heads_dir is None and args.api_server_count is None


def test_heads_can_be_changed_where_a_key_and_a_folder_say_so(serve, model, heads, admin_key):
    args = serve(model, f"--heads-dir={heads}")
    assert settings_of(args).heads_dir == heads and args.api_server_count == 1
    assert "open-sesame-please" not in repr(args)
    headless = serve(model, f"--heads-dir={heads}", "--headless")
    assert headless.api_server_count is None, "a node without an API process has none to count"


def test_half_of_what_changing_heads_needs_is_refused(
    refusal, model, heads, admin_key, monkeypatch
):
    assert "--heads-dir" in refusal(model)
    assert "not a folder" in refusal(model, f"--heads-dir={heads / 'gone'}")
    several = refusal(model, f"--heads-dir={heads}", "--api-server-count=2")
    assert "--api-server-count 1" in several
    elastic = refusal(model, f"--heads-dir={heads}", "--enable-elastic-ep")
    assert "does not work with --enable-elastic-ep" in elastic
    monkeypatch.setenv("ADAPTIVE_ADMIN_KEY", "schlüssel")
    assert "ASCII" in refusal(model, f"--heads-dir={heads}")
    monkeypatch.setenv("ADAPTIVE_ADMIN_KEY", "fifteen letters")
    short = refusal(model, f"--heads-dir={heads}")
    assert "at least 16 characters, and has 15" in short and "letters" not in short
    monkeypatch.delenv("ADAPTIVE_ADMIN_KEY")
    assert "ADAPTIVE_ADMIN_KEY" in refusal(model, f"--heads-dir={heads}")


def test_requests_are_ordinary_by_default(serve, model):
    assert settings_of(serve(model)).adaptive_by_default is False


def test_requests_are_adaptive_by_default_only_where_a_head_can_answer(
    serve, refusal, model, heads
):
    args = serve(model, f"--head={heads / 'a'}", "--adaptive-default")
    assert settings_of(args).adaptive_by_default is True
    assert "--adaptive-default needs a --head" in refusal(model, "--adaptive-default")


def test_the_policy_is_a_name_or_an_object(serve, model):
    assert settings_of(serve(model)).adaptive_policy is None
    assert settings_of(serve(model, "--adaptive-policy", "entropy")).adaptive_policy.policy == (
        "entropy"
    )
    constant = '{"policy": "constant", "constant": {"temperature": 0.6}}'
    policy = settings_of(serve(model, "--adaptive-policy", constant)).adaptive_policy
    assert (policy.policy, policy.constant.temperature) == ("constant", 0.6)


def test_with_a_policy_requests_are_adaptive_by_default_without_a_head(serve, refusal, model):
    args = serve(model, "--adaptive-default", "--adaptive-policy=entropy")
    assert settings_of(args).adaptive_by_default is True
    assert "--adaptive-default needs a --head" in refusal(
        model, "--adaptive-default", "--adaptive-policy=head"
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("warm", "--adaptive-policy: must be one of head, entropy"),
        ("", "--adaptive-policy: must be one of head, entropy"),
        ("5", "--adaptive-policy: must be one of"),
        ("{", "--adaptive-policy: not a JSON object: "),
        ('{"policy": "warm"}', "--adaptive-policy: policy: Input should be 'head', 'entropy'"),
        (
            '{"policy": "entropy", "entropy": {"t0": 99}}',
            "--adaptive-policy: entropy.t0: Input should be less than or equal to 10",
        ),
        ('{"policy": "entropy", "min": NaN}', "--adaptive-policy: min: "),
        ('{"head": "a"}', "--adaptive-policy: head: leave it out; --default-head"),
        ('{"temperature": 1}', "--adaptive-policy: temperature: unknown field; the fields are"),
    ],
)
def test_a_wrong_policy_is_refused_with_flag_and_field(refusal, model, value, words):
    assert words in refusal(model, f"--adaptive-policy={value}")


def test_the_highest_temperature_is_a_temperature(serve, refusal, model):
    assert settings_of(serve(model)).adaptive_max is None
    assert settings_of(serve(model, "--adaptive-max", "0")).adaptive_max == 0.0
    assert settings_of(serve(model, "--adaptive-max", 0.8)).adaptive_max == 0.8
    for value in ("-0.1", "10.5", "nan", "inf", "warm", ""):
        sentence = refusal(model, f"--adaptive-max={value}")
        assert f"--adaptive-max {value}: must be a temperature, from 0 to 10" in sentence
    policy = '{"policy": "entropy", "min": 0.5}'
    sentence = refusal(model, "--adaptive-max=0.4", "--adaptive-policy", policy)
    assert "--adaptive-policy: min: must be at most 0.4, the --adaptive-max, got 0.5" in sentence


def test_the_request_log_is_tried_before_anything_starts(serve, refusal, model, tmp_path):
    assert settings_of(serve(model)).request_log is None
    assert settings_of(serve(model, "--request-log", "-")).request_log == "-"
    file = tmp_path / "log"
    assert settings_of(serve(model, "--request-log", file)).request_log == str(file)
    assert json.loads(file.read_text())["event"] == "start"
    sentence = refusal(model, "--request-log", "/dev/full")
    assert sentence == "adaptive-serve: --request-log /dev/full: No space left on device\n"
    gone = tmp_path / "gone" / "log"
    assert f"--request-log {gone}: No such file" in refusal(model, "--request-log", gone)


def test_answers_may_end_when_the_server_stops_unless_the_user_is_in_a_hurry(serve, model):
    assert serve(model).shutdown_timeout == cli.SHUTDOWN_TIMEOUT_S
    assert serve(model, "--shutdown-timeout", 0).shutdown_timeout == 0


def test_limits_are_options_and_what_is_no_limit_is_refused(serve, refusal, model):
    assert settings_of(serve(model)).limits == Limits()
    args = serve(model, "--max-body-bytes", 5, "--max-grammar-seconds", 0.5)
    limits = settings_of(args).limits
    assert (limits.max_body_bytes, limits.max_grammar_seconds) == (5, 0.5)
    for value in (0, -1):
        sentence = refusal(model, "--max-choices", value)
        assert f"--max-choices {value}: must be a positive number" in sentence
    for value in ("nan", "inf"):
        assert "--max-read-seconds" in refusal(model, "--max-read-seconds", value)


def test_the_queue_is_bounded_above_what_autoscaler_and_alerts_look_at(serve, model):
    assert serve(model).max_num_queued_reqs == DEFAULT_MAX_QUEUED
    assert serve(model, "--max-num-queued-reqs", 7).max_num_queued_reqs == 7
    values = yaml.safe_load((ROOT / "deploy/kubernetes/values.yaml").read_text())
    assert values["autoscaling"]["requestsPerReplica"] < DEFAULT_MAX_QUEUED
    rules = (ROOT / "deploy/prometheus/rules/alerts.yml").read_text()
    (waiting,) = re.findall(r"vllm:num_requests_waiting.* > (\d+)", rules)
    assert int(waiting) < DEFAULT_MAX_QUEUED


def test_a_dead_engine_is_exit_code_1(served, model, monkeypatch, capsys):
    monkeypatch.setattr(shutdown.DRAIN, "has_engine_died", True)
    with pytest.raises(SystemExit) as caught:
        cli.main([str(model)])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "adaptive-serve: the engine died\n"


def test_vllms_options_of_logging_are_applied(serve, model, monkeypatch):
    applied = []
    monkeypatch.setattr("vllm.logger.configure_logging_if_needed", applied.append)
    serve(model, "--logging-config.formatter", "json")
    assert applied[0].formatter == "json"


def test_a_folder_may_have_an_equals_sign_in_its_path(refusal, model, heads):
    assert "run=3" in refusal(model, f"--head={heads}/run=3/gone")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--grpc",),
        ("--additional-config", "[1]"),
        ("--enable-auto-tool-choice",),
        ("--chat-template", "/nowhere/template"),
    ],
)
def test_vllms_own_refusals_and_ours_are_one_sentence(refusal, model, arguments):
    assert arguments[0] in refusal(model, *arguments) or arguments[-1] in refusal(model, *arguments)


@pytest.mark.parametrize(
    "option", [{"enable_adaptive_verification": True}, {"rejection_sample_method": "fly"}]
)
def test_speculation_that_cannot_be_served_is_refused_before_the_engine_starts(
    refusal, model, option, monkeypatch
):
    monkeypatch.setattr("server.cli.is_v2_likely", lambda: True)
    ((name, _),) = option.items()
    speculation = json.dumps({"method": "ngram", "num_speculative_tokens": 2} | option)
    assert name in refusal(model, "--speculative-config", speculation)


@pytest.mark.parametrize(
    ("option", "value"), [("--worker-cls", "my.Worker"), ("--scheduler-cls", "my.Scheduler")]
)
def test_another_worker_or_scheduler_is_refused(refusal, model, option, value):
    assert f"{option} {value}" in refusal(model, option, value)


def test_our_worker_and_scheduler_may_be_named(serve, model):
    args = serve(model, "--worker-cls", WORKER_CLS, "--scheduler-cls", SCHEDULER_CLS)
    assert args.worker_cls == WORKER_CLS


def test_other_additional_config_is_kept_and_ours_refused(refusal, serve, model):
    args = serve(model, "--additional-config", '{"other": 1}')
    assert args.additional_config["other"] == 1
    assert "--head" in refusal(model, "--additional-config", '{"adaptive": {}}')


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "adaptive"), ("x,y", "x,y,adaptive"), ("adaptive", "adaptive"), (",x,", "x,adaptive")],
)
def test_other_plugins_stay_enabled(serve, model, monkeypatch, before, after):
    monkeypatch.setenv("VLLM_PLUGINS", before)
    serve(model)
    assert os.environ["VLLM_PLUGINS"] == after


def test_vllms_rust_front_end_is_refused(refusal, serve, model, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "VLLM_USE_RUST_FRONTEND" in refusal(model)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    serve(model)


@pytest.fixture
def embedded(monkeypatch, model, heads):
    """The tiny model in the place of the embedded one, with a head that ships."""
    monkeypatch.setattr(cli, "prepare", lambda: model)
    monkeypatch.setattr(cli, "SHIPPED_HEADS", {"a": heads / "a", "b": heads / "b"})


def test_without_a_model_the_embedded_one_is_served_with_its_head(serve, embedded, model, heads):
    args = serve("--port", 8123)
    assert (args.model_tag, args.served_model_name) == (str(model), [cli.EMBEDDED_NAME])
    assert settings_of(args).heads == {"a": heads / "a", "b": heads / "b"}
    assert settings_of(args).default_head is None


def test_the_embedded_model_may_have_another_name_and_head(serve, embedded, heads):
    args = serve("--served-model-name", "mine", "--head", heads / "b")
    assert args.served_model_name == ["mine"]
    assert settings_of(args).heads == {"b": heads / "b"}


def test_a_model_given_as_an_option_or_in_a_file_is_not_ignored(
    serve, embedded, tmp_path, monkeypatch
):
    config = tmp_path / "serve.yaml"
    config.write_text("model: org/other\nport: 8124\n")
    assert serve("--model", "org/other").model_tag == "org/other"
    assert serve("--model=org/other").model_tag == "org/other"
    args = serve("--config", config)
    assert (args.model_tag, args.port) == ("org/other", 8124)


def test_the_heads_that_ship_are_trained_small_and_for_the_embedded_model():
    assert list(SHIPPED_HEADS) == ["sequence", "token"]
    fingerprint = fingerprint_model(prepare())
    for level, folder in SHIPPED_HEADS.items():
        metadata = load_head(folder, fingerprint=fingerprint).metadata
        assert metadata.trained
        assert metadata.level == level
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
        assert metadata.training["provenance"]["experiment"]["name"] == "mix"


def test_the_default_that_ships_has_passed_the_gate():
    heads = {name: read_metadata(folder) for name, folder in SHIPPED_HEADS.items()}
    assert heads[choose_default(heads)].gate == "passed"
    assert all(head.gate for head in heads.values())


@pytest.mark.skipif(not current_platform.is_cpu(), reason="defaults for CPUs")
def test_a_cpu_gets_defaults_that_fit_it_and_the_users_values_win(serve, model, monkeypatch):
    args = serve(model)
    assert args.enforce_eager is True
    assert args.kv_cache_memory_bytes == cli.CPU_KV_CACHE_BYTES
    assert args.dtype == choose_dtype()
    args = serve(model, "--no-enforce-eager", "--dtype", "half", "--kv-cache-memory-bytes", 1000)
    assert (args.enforce_eager, args.dtype, args.kv_cache_memory_bytes) == (False, "half", 1000)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert serve(model).kv_cache_memory_bytes is None


@pytest.mark.skipif(not current_platform.is_cpu(), reason="defaults for CPUs")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_default_dtype_is_float32_without_bfloat16_instructions(
    processor, serve, model, monkeypatch
):
    run_on(monkeypatch, processor)
    default = "float32" if processor in WITHOUT_BFLOAT16 else "auto"
    assert serve(model).dtype == default
    assert serve(model, "--dtype", "bfloat16").dtype == "bfloat16"
    assert serve(model, "--dtype=auto").dtype == "auto"


def test_options_that_begin_like_ours_are_vllms(serve, model):
    assert serve(model, "--headless").headless is True


def test_an_unknown_option_ends_with_the_usage(served, model, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(model), "--no-such-option"])
    assert caught.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_our_options_at_once(option):
    program = f"import sys, server.cli; server.cli.main(['{option}']); print('vllm' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_S
    ).stdout
    for action in cli.make_parser()._actions:
        assert action.option_strings[0] in output
        assert action.help.split("(")[0].split(";")[0].strip()[:30] in " ".join(output.split())
    assert "--help=all" in output
    assert output.endswith("False\n"), "the help waits for vLLM's import"


def test_naming_our_plugin_keeps_those_that_vllm_would_load_by_itself(monkeypatch):
    installed = {
        "vllm.general_plugins": ["other"],
        "vllm.endpoint_plugins": ["routes", "adaptive"],
        "vllm.stat_logger_plugins": ["logger"],
    }
    monkeypatch.setattr(
        cli,
        "entry_points",
        lambda group: [SimpleNamespace(name=name) for name in installed.get(group, [])],
    )
    # Set first: what was never there, monkeypatch would not take away again.
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delenv("VLLM_PLUGINS")
    cli.prepare_environment()
    assert os.environ["VLLM_PLUGINS"] == "logger,other,adaptive"
