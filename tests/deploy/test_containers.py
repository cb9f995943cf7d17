"""The image and the compose stack, as far as they can be checked without a container engine."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from server.cli import make_parser, parse_vllm, prepare_environment
from tests.programs import HANG_S

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
COMPOSE_FILES = ("docker-compose.yml", "docker-compose.cuda.yml")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PAGE = (ROOT / "docs/deployment.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What the image of the load tests does without.
SERVER_PACKAGES = ("adaptive_head", "server", "torch", "transformers", "vllm")
IMPORT_LOCUSTFILE = f"""
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in {SERVER_PACKAGES}, name

sys.meta_path.insert(0, Refuse())
import loadtests.locustfile
"""


def parse_compose(name: str = COMPOSE_FILES[0]) -> dict:
    """A compose file with the defaults of its variables."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / name).read_text())
    assert "$" not in text
    return yaml.safe_load(text)


COMPOSE = parse_compose()
SERVICES = COMPOSE["services"]


def find_arguments(instruction: str) -> list[str]:
    """What follows an instruction in the Dockerfile, once for each time that it is there."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{instruction} +(.*)$", joined, re.MULTILINE)


def parse_stages() -> dict[str, list[str]]:
    """The instructions of each stage, without its FROM, in the order of the Dockerfile."""
    stages = {}
    for text in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        first, *lines = text.replace("\\\n", " ").splitlines()
        name = first.rpartition(" AS ")[2]
        stages[name] = [line for line in lines if line and not line.startswith("#")]
    return stages


STAGES = parse_stages()


def parse_duration(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


@pytest.fixture
def parse_server_command(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

    def parse(command: str) -> tuple[Namespace, Namespace]:
        prepare_environment()
        ours, rest = make_parser().parse_known_args(shlex.split(command))
        return ours, parse_vllm(rest)

    return parse


def test_hadolint_finds_nothing():
    result = subprocess.run(
        [BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=HANG_S
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_keep_to_the_specification(name):
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert result.returncode == 0, result.stdout


def test_all_images_bring_the_vllm_that_the_project_needs():
    bases = dict(argument.split("=") for argument in find_arguments("ARG") if "_BASE=" in argument)
    for device, image in (("cpu", "vllm-openai-cpu"), ("cuda", "vllm-openai")):
        needed, *_ = map(Requirement, PROJECT["optional-dependencies"][device])
        name, _, version = bases[f"{device.upper()}_BASE"].partition(":v")
        assert name == f"vllm/{image}" and version in needed.specifier


def test_versions_are_those_of_the_package():
    assert f"VERSION={PROJECT['version']}" in find_arguments("ARG")
    for name in COMPOSE_FILES:
        for service in parse_compose(name)["services"].values():
            if "build" in service:
                version = service["image"].partition(":")[2]
                assert version.removesuffix("-cuda") == PROJECT["version"]


def test_images_run_their_program_as_a_user_without_rights():
    programs = {"load": "locust", "cuda": "adaptive-serve", "cpu": "adaptive-serve"}
    assert programs["cpu"] in PROJECT["scripts"]
    assert list(STAGES) == ["wheel", *programs]
    for name, program in programs.items():
        stage = STAGES[name]
        users = [line.split()[1] for line in stage if line.startswith("USER ")]
        assert re.fullmatch(r"\d{5}:0", users[-1])
        assert "STOPSIGNAL SIGTERM" in stage
        # A list, not a shell's command: the program gets the signal.
        (command,) = [line for line in stage if line.startswith("ENTRYPOINT ")]
        assert json.loads(command.removeprefix("ENTRYPOINT "))[0] == program


def test_the_servers_images_differ_in_their_base_only():
    assert STAGES["cpu"] == STAGES["cuda"]
    for name in ("cpu", "cuda"):
        assert f"\nFROM ${{{name.upper()}_BASE}} AS {name}\n" in DOCKERFILE
    assert any(line.startswith("HEALTHCHECK ") for line in STAGES["cpu"])
    assert list(STAGES)[-1] == "cpu"  # What a build without a target makes.


def test_the_images_script_is_where_the_builder_finds_it():
    (copy,) = [line for line in STAGES["cpu"] if line.startswith("COPY ")]
    *_, source, folder = copy.split()
    script = ROOT / source.removeprefix("/source/")
    assert f"RUN {folder}{script.name}" in STAGES["cpu"]
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True, timeout=HANG_S)
    assert "\nset -eu\n" in script.read_text()


def test_the_builder_sees_what_it_copies_and_no_more():
    """No test data, no history, no environment with secrets goes to the builder."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    wheel = targets["targets"]["wheel"]["packages"]
    needed = {*wheel, PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"}
    assert allowed == needed | {"deploy/image", "loadtests"}
    assert all((ROOT / name).exists() for name in allowed)


def test_locust_needs_nothing_of_the_server():
    subprocess.run([sys.executable, "-c", IMPORT_LOCUSTFILE], cwd=ROOT, check=True, timeout=HANG_S)


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_pinned_hardened_and_local(name):
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["deploy"]["resources"]["limits"]["memory"]
    for port in service["ports"]:
        assert port.startswith("127.0.0.1:")


def test_what_is_mounted_exists():
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source, target, *mode = mount.split(":")
            if source.startswith("."):
                assert (ROOT / source).is_dir(), source
                assert mode == ["ro"]
            else:
                assert source in COMPOSE["volumes"]
            assert target.startswith("/")


def test_services_wait_only_for_what_tells_its_health():
    for name, service in SERVICES.items():
        for other, wait in service.get("depends_on", {}).items():
            assert wait == {"condition": "service_healthy"}
            is_in_image = other == "server" and find_arguments("HEALTHCHECK")
            assert is_in_image or SERVICES[other]["healthcheck"]["test"], (name, other)
    for service in SERVICES.values():
        if build := service.get("build"):
            assert build["target"] in STAGES


def test_containers_listen_beyond_themselves(parse_server_command):
    for name in ("cpu", "cuda"):
        (entrypoint,) = [line for line in STAGES[name] if line.startswith("ENTRYPOINT ")]
        arguments = json.loads(entrypoint.removeprefix("ENTRYPOINT "))[1:]
        for command in ([], ["--shutdown-timeout", "5"], ["--host", "::"]):
            _, args = parse_server_command(shlex.join(arguments + command))
            assert args.host == ("::" if "::" in command else "0.0.0.0")
    _, args = parse_server_command(SERVICES["server"]["command"])
    assert args.host == "0.0.0.0"


def test_keys_come_from_the_environment_and_go_to_all_who_ask_the_server():
    for name in ("server", "prometheus", "load"):
        assert "VLLM_API_KEY" in SERVICES[name]["environment"]
    assert "ADAPTIVE_ADMIN_KEY" in SERVICES["server"]["environment"]
    for name in ("server", "load"):
        assert "key" not in SERVICES[name]["command"]
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for block in re.findall(r"^```(?:bash|yaml|ini)\n(.*?)^```", file.read_text(), re.M | re.S):
            assert "--api-key" not in block, file


@pytest.mark.parametrize("key", ["a %s key", "", None])
def test_prometheus_reads_the_key_from_a_file(tmp_path, key):
    """Of what the container runs, with a stand-in for its program and its /tmp."""
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (file,) = [job["authorization"]["credentials_file"] for job in scrape["scrape_configs"]]
    folder, name = file.rsplit("/", 1)
    service = SERVICES["prometheus"]
    assert folder in service["tmpfs"]
    shell, script = service["entrypoint"]
    mounts = dict(mount.split(":")[1::-1] for mount in service["volumes"])
    path = ROOT / mounts[script.rpartition("/")[0]] / script.rpartition("/")[2]
    copy = tmp_path / "start.sh"
    copy.write_text(path.read_text().replace(file, str(tmp_path / name)))
    program = tmp_path / "prometheus"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    if key is not None:
        environment["VLLM_API_KEY"] = key
    done = subprocess.run(
        [shell, copy, *service["command"]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    assert done.stdout.splitlines() == service["command"]
    assert (tmp_path / name).read_text() == (key or "")
    assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_the_server_stops_within_its_grace_period(parse_server_command):
    ours, args = parse_server_command(SERVICES["server"]["command"])
    assert (ours.head, args.model_tag) == ([], None)
    assert 0 < args.shutdown_timeout < parse_duration(SERVICES["server"]["stop_grace_period"])


def test_addresses_fit():
    """Each service is asked where it listens."""
    for health in find_arguments("HEALTHCHECK"):
        assert "http://127.0.0.1:8000/health" in health
    assert SERVICES["server"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "--host http://server:8000" in SERVICES["load"]["command"]
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    targets = {
        job["job_name"]: [target for group in job["static_configs"] for target in group["targets"]]
        for job in prometheus["scrape_configs"]
    }
    assert targets["adaptive"] == ["server:8000"]
    provisioning = ROOT / "deploy/grafana/provisioning"
    (sources,) = provisioning.glob("datasources/*.yml")
    assert yaml.safe_load(sources.read_text())["datasources"][0]["url"] == "http://prometheus:9090"
    (providers,) = provisioning.glob("dashboards/*.yml")
    folder = yaml.safe_load(providers.read_text())["providers"][0]["options"]["path"]
    assert f"./deploy/grafana/dashboards:{folder}:ro" in SERVICES["grafana"]["volumes"]


def test_grafana_has_no_account_to_guess():
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert not any("PASSWORD" in name for name in environment)


def test_the_cuda_file_changes_the_target_and_asks_for_gpus():
    (service,) = parse_compose("docker-compose.cuda.yml")["services"].items()
    name, changes = service
    assert name == "server"
    assert SERVICES["server"]["build"]["target"] == "cpu"
    assert changes["build"] == {"target": "cuda"}
    (device,) = changes["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_the_pages_builds_name_stages_and_arguments_that_there_are():
    builds = [command for command in COMMANDS if command[:2] == ["docker", "build"]]
    targets = [command[command.index("--target") + 1] for command in builds]
    assert targets == ["cpu", "cuda", "load"]
    assert set(targets) <= STAGES.keys()
    names = set(re.findall(r"`([A-Z]+_BASE)`", PAGE)) | set(re.findall(r"--build-arg (\w+)=", PAGE))
    assert names == {"CPU_BASE", "CUDA_BASE", "BAKE_MODEL"}
    for name in names:
        assert any(line.startswith(f"{name}=") for line in find_arguments("ARG"))


def test_the_pages_containers_get_arguments_that_the_server_takes(parse_server_command):
    runs = [command for command in COMMANDS if command[:2] == ["docker", "run"]]
    assert len(runs) == 3
    for command in runs:
        arguments = command[command.index("adaptive-head-server") + 1 :]
        ours, _ = parse_server_command(shlex.join(arguments))
        assert ours.head == []


def test_the_pages_stacks_name_files_and_profiles_that_there_are(parse_server_command):
    stacks = [command for command in COMMANDS if command[:2] == ["docker", "compose"]]
    assert len(stacks) == 3
    for command in stacks:
        for option, value in pairwise(command):
            assert option != "-f" or value in COMPOSE_FILES
            assert option != "--profile" or value in SERVICES["load"]["profiles"]
    (settings,) = re.findall(r"^```ini\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    values = dict(line.split("=", 1) for line in settings.splitlines())
    assert values.keys() <= find_variables()
    ours, args = parse_server_command(f"{SERVICES['server']['command']} {values['SERVER_ARGS']}")
    assert (ours.head, args.model_tag) == (["mine=/heads/mine"], "Qwen/Qwen3-8B")
    mounts = SERVICES["server"]["volumes"]
    assert any(mount.endswith(":/heads:ro") for mount in mounts)


def test_the_compose_file_lists_its_variables():
    comment = (ROOT / "docker-compose.yml").read_text().split("\n\n")[0]
    assert set(re.findall(r"[A-Z]+(?:_[A-Z]+)+|BIND|HEADS", comment)) == find_variables()


def find_variables() -> set[str]:
    return set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
