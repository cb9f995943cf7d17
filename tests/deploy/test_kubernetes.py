"""The Helm chart: rendered by Helm's own library, checked against Kubernetes' own schemas."""

import json
import re
import shlex
from argparse import Namespace
from pathlib import Path

import helm_python
import kubernetes_validate
import pytest
import vllm.v1.metrics.loggers
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor

from adaptive_head.vllm.settings import ADMIN_KEY_VARIABLE
from server.cli import make_parser, parse_vllm, prepare_environment

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy/kubernetes"
OLDEST, NEWEST = "1.30", "1.37"
CUSTOM = {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor}
EVERYTHING = {
    "model": "Qwen/Qwen3-8B",
    "defaultHead": "careful",
    "heads": [
        {"name": "careful", "image": {"reference": "registry.example/heads/careful:1"}},
        {"name": "fast", "claim": {"name": "heads", "subPath": "fast"}},
        {
            "name": "fetched",
            "fetch": {
                "image": "amazon/aws-cli:2.27.50",
                "command": ["aws"],
                "args": ["s3", "cp", "--recursive", "s3://bucket/head", "/heads/fetched"],
                "envFrom": [{"secretRef": {"name": "s3"}}],
            },
        },
    ],
    "runtimeHeads": {"claim": "library", "adminKeySecret": "admin"},
    "args": ["--max-model-len=8192"],
    "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "WARNING"}],
    "hfTokenSecret": "hub",
    "apiKeySecret": "api",
    "imagePullSecrets": [{"name": "registry"}],
    "gpu": {"count": 1},
    "cache": {"claim": "models"},
    "runtimeClassName": "nvidia",
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "autoscaling": {"enabled": True},
}
# Pod Security Standards, restricted; image volumes are allowed since Kubernetes 1.33.
RESTRICTED_VOLUMES = {"emptyDir", "persistentVolumeClaim", "image"}


def render(values: dict | None = None, name: str = "demo") -> dict[str, dict]:
    """The chart's resources by kind."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values or {}, name=name, namespace="prod")
    documents = [part for text in files.values() for part in yaml.safe_load_all(text) if part]
    resources = {document["kind"]: document for document in documents}
    assert len(resources) == len(documents)
    return resources


@pytest.fixture(params=[{}, EVERYTHING], ids=["defaults", "everything"])
def resources(request) -> dict[str, dict]:
    return render(request.param)


@pytest.fixture
def pod(resources) -> dict:
    return resources["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def server(pod) -> dict:
    (container,) = pod["containers"]
    return container


@pytest.fixture
def arguments(server, monkeypatch) -> tuple[Namespace, Namespace]:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    prepare_environment()
    ours, rest = make_parser().parse_known_args(server["args"])
    return ours, parse_vllm(rest)


def test_helm_finds_no_fault():
    report = helm_python.lint(str(CHART))
    assert report["total_charts_linted"] == 1
    assert not report["errors"]
    assert [note["error"] for note in report["messages"]] == ["icon is recommended"]


def test_the_schema_knows_each_value_and_no_other():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(schema: dict, values: dict, path: str) -> None:
        assert schema["additionalProperties"] is False, path
        assert values.keys() <= schema["properties"].keys(), path
        for name, value in values.items():
            inner = schema["properties"][name]
            if isinstance(value, dict) and "properties" in inner and name != "resources":
                assert inner["properties"].keys() == value.keys(), name
                compare(inner, value, f"{path}.{name}")

    compare(schema, values, "values")
    assert schema["properties"].keys() - values.keys() == {"global"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"repliacs": 2}, "repliacs"),
        ({"replicas": "two"}, "replicas"),
        ({"heads": [{"name": "mine"}]}, "heads"),
        ({"heads": [{"name": "a/b", "claim": {"name": "heads"}}]}, "name"),
        ({"heads": [{"name": "a", "claim": {"name": "c"}, "image": {"reference": "r"}}]}, "heads"),
        ({"autoscaling": {"minReplicas": 0}}, "minReplicas"),
        ({"gpu": {"count": -1}}, "count"),
        ({"sharedMemory": "a lot"}, "sharedMemory"),
        ({"runtimeHeads": {"claim": "library"}}, "runtimeHeads.adminKeySecret"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values, named):
    with pytest.raises(helm_python.HelmError, match=named):
        render(values)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_resources_keep_to_the_schemas_of_kubernetes(version):
    values = dict(EVERYTHING)
    if version == OLDEST:  # which has no image volumes
        values["heads"] = EVERYTHING["heads"][1:]
    for resource in render(values).values():
        if resource["kind"] not in CUSTOM:
            kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("kind", CUSTOM)
def test_resources_keep_to_the_schemas_of_the_operators(kind):
    """A field that the operator does not know would be missing from what its model gives back."""
    resource = render(EVERYTHING)[kind]
    model = CUSTOM[kind].model_validate(resource)
    assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) == resource


def test_operators_are_asked_for_nothing_unless_they_are_there():
    assert not render().keys() & CUSTOM.keys()
    assert render()["Deployment"]["spec"]["replicas"] == 1
    assert "replicas" not in render(EVERYTHING)["Deployment"]["spec"]


def test_the_pod_is_restricted(resources, pod):
    assert not resources["ServiceAccount"]["automountServiceAccountToken"]
    assert not pod["automountServiceAccountToken"]
    assert pod["serviceAccountName"] == resources["ServiceAccount"]["metadata"]["name"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"] + pod.get("initContainers", []):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
    for volume in pod["volumes"]:
        assert volume.keys() - {"name"} <= RESTRICTED_VOLUMES


def test_everything_selects_the_pod(resources):
    spec = {kind: resource.get("spec", {}) for kind, resource in resources.items()}
    labels = spec["Deployment"]["template"]["metadata"]["labels"]
    selectors = [
        spec["Deployment"]["selector"]["matchLabels"],
        spec["Service"]["selector"],
        spec["PodDisruptionBudget"]["selector"]["matchLabels"],
        spec["NetworkPolicy"]["podSelector"]["matchLabels"],
    ]
    for constraint in spec["Deployment"]["template"]["spec"]["topologySpreadConstraints"]:
        selectors.append(constraint["labelSelector"]["matchLabels"])
    if "PodMonitor" in spec:
        selectors.append(spec["PodMonitor"]["selector"]["matchLabels"])
        target = spec["ScaledObject"]["scaleTargetRef"]["name"]
        assert target == resources["Deployment"]["metadata"]["name"]
    assert all(selector.items() <= labels.items() for selector in selectors)


def test_the_port_is_the_servers(resources, server, arguments):
    _, args = arguments
    (port,) = server["ports"]
    assert port == {"name": "http", "containerPort": args.port}
    assert args.host == "0.0.0.0"
    probes = [server[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert probes == [{"path": "/health", "port": "http"}] * 3
    assert resources["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    (ingress,) = resources["NetworkPolicy"]["spec"]["ingress"]
    assert ingress["ports"] == [{"protocol": "TCP", "port": "http"}]


def test_the_server_may_load_and_drain_as_long_as_the_values_say(pod, server, arguments):
    _, args = arguments
    pause = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert args.shutdown_timeout == 30
    assert pod["terminationGracePeriodSeconds"] >= pause + args.shutdown_timeout + 20
    startup = server["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] == 1800


def test_values_change_the_times():
    values = {"shutdownTimeoutSeconds": 300, "startupTimeoutSeconds": 3605}
    spec = render(values)["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    (server,) = pod["containers"]
    assert "--shutdown-timeout=300" in server["args"]
    assert pod["terminationGracePeriodSeconds"] > 305
    assert server["startupProbe"]["failureThreshold"] == 361
    assert spec["progressDeadlineSeconds"] > 3605


def test_each_head_is_mounted_where_the_server_looks():
    pod = render(EVERYTHING)["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    ours, _ = make_parser().parse_known_args(server["args"])
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert ours.default_head == "careful"
    assert ours.head == [f"{name}=/heads/{name}" for name in ("careful", "fast", "fetched")]
    careful, fast, fetched = (mounts[head.partition("=")[2]] for head in ours.head)
    assert all(mount["readOnly"] for mount in (careful, fast, fetched))
    assert volumes[careful["name"]]["image"] == {"reference": "registry.example/heads/careful:1"}
    assert volumes[fast["name"]]["persistentVolumeClaim"]["claimName"] == "heads"
    assert fast["subPath"] == "fast"
    (fetcher,) = pod["initContainers"]
    assert {"name": fetched["name"], "mountPath": "/heads"} in fetcher["volumeMounts"]
    assert fetcher["args"][-1] == f"/heads/{fetched['subPath']}"


def test_heads_may_change_at_runtime_where_the_values_say_so():
    pod = render(EVERYTHING)["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    ours, _ = make_parser().parse_known_args(server["args"])
    assert {"name": "library", "mountPath": str(ours.heads_dir), "readOnly": True} in server[
        "volumeMounts"
    ]
    (key,) = (entry for entry in server["env"] if entry["name"] == ADMIN_KEY_VARIABLE)
    assert key["valueFrom"]["secretKeyRef"] == {"name": "admin", "key": ADMIN_KEY_VARIABLE}
    assert "heads-dir" not in str(render())


def test_gpus_are_limits_beside_the_other_resources():
    (server,) = render(EVERYTHING)["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert server["resources"]["limits"] == {"memory": "12Gi", "nvidia.com/gpu": 1}
    assert server["resources"]["requests"] == {"cpu": "2", "memory": "6Gi"}


def test_scaling_follows_metrics_that_vllm_has():
    (trigger,) = render(EVERYTHING)["ScaledObject"]["spec"]["triggers"]
    metadata = trigger["metadata"]
    pods = '{namespace="prod", pod=~"demo-adaptive-head-server-.*"}'
    names = ["vllm:num_requests_waiting", "vllm:num_requests_running"]
    assert metadata["query"] == " + ".join(f"sum({name}{pods})" for name in names)
    loggers = Path(vllm.v1.metrics.loggers.__file__).read_text()
    assert all(f'name="{name}"' in loggers for name in names)
    assert metadata["threshold"] == "32"


def test_prometheus_names_the_job_as_the_rules_do():
    (endpoint,) = render(EVERYTHING)["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert {"targetLabel": "job", "replacement": "adaptive"} in endpoint["relabelings"]


def test_prometheus_gets_the_key_that_the_server_wants():
    resources = render(EVERYTHING)
    (server,) = resources["Deployment"]["spec"]["template"]["spec"]["containers"]
    (key,) = (entry for entry in server["env"] if entry["name"] == "VLLM_API_KEY")
    secret = key["valueFrom"]["secretKeyRef"]
    (endpoint,) = resources["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": secret}
    (endpoint,) = render(EVERYTHING | {"apiKeySecret": ""})["PodMonitor"]["spec"][
        "podMetricsEndpoints"
    ]
    assert "authorization" not in endpoint


def test_no_key_is_among_the_arguments():
    for resource in render(EVERYTHING).values():
        assert "--api-key" not in str(resource)


@pytest.mark.parametrize("name", ["adaptive-head-server", "x" * 53])
def test_names_stay_within_what_kubernetes_takes(name):
    for resource in render(EVERYTHING, name=name).values():
        assert len(resource["metadata"]["name"]) <= 63


def test_the_pages_command_and_values_render():
    page = (ROOT / "docs/deployment.md").read_text()
    (command,) = re.findall(r"^helm install (.*?)^```", page, re.MULTILINE | re.DOTALL)
    name, chart, *options = shlex.split(command.replace("\\\n", ""))
    assert ROOT / chart == CHART
    values = helm_python.parse_set_string(options[options.index("--set") + 1])
    (server,) = render(values, name)["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert server["image"] == "registry.example/adaptive-head-server:0.1.0"
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (values, pool) = map(yaml.safe_load, blocks)
    resources = render(values, name)
    (server,) = resources["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert "--head=mine=/heads/mine" in server["args"]
    for resource in resources.values():
        if resource["kind"] not in CUSTOM:
            kubernetes_validate.validate(resource, OLDEST, strict=True)
    labels = resources["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
    recreated = render(helm_python.parse_set_string("strategy.type=Recreate"))
    assert recreated["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
