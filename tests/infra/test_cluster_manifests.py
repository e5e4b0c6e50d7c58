"""The manifests of `infra/cluster/` against schemas, without a cluster, and its container file under a linter.

Kubernetes' own kinds and the pod templates are checked against Kubernetes' published schemas, unknown fields refused. The fields of
KubeRay's that we use stand below, written down from its API reference (ray.io/v1): the whole definition is not part of any package.
"""

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from kinetok.infra.capacity import Cluster, Nodes
from kinetok.infra.stage import Ask, Resources

FOLDER = Path(__file__).parents[2] / "infra" / "cluster"
Manifest = dict[str, Any]


def _object(required: tuple[str, ...] = (), **properties: object) -> dict[str, object]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
TEMPLATE = _object(("spec",), metadata={"type": "object"}, spec={"type": "object"})
CLUSTER = _object(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=_object(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=_object(
        version={"enum": ["v1", "v2"]}, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, idleTimeoutSeconds=COUNT
    ),
    headGroupSpec=_object(
        ("template",), serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, rayStartParams=TEXTS, template=TEMPLATE
    ),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            ("groupName", "minReplicas", "maxReplicas", "template"),
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=TEMPLATE,
        ),
    },
)
JOB = _object(
    ("rayClusterSpec",),
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    runtimeEnvYAML=TEXT,
    rayClusterSpec=CLUSTER,
)
RAY = {"RayCluster": CLUSTER, "RayJob": JOB}


def manifests(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def spec_of_cluster() -> Manifest:
    found: Manifest = next(one for one in manifests("ray-cluster.yaml") if one["kind"] == "RayCluster")["spec"]
    return found


def groups(spec: Manifest) -> list[Manifest]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def check(manifest: Manifest) -> None:
    """Raise where a manifest does not fit its schema."""
    if manifest["kind"] not in RAY:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        return
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.validate(manifest["spec"], RAY[manifest["kind"]])
    for group in groups(manifest["spec"].get("rayClusterSpec", manifest["spec"])):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ["ray-cluster.yaml", "ray-job.yaml", "mlflow.yaml"])
def test_manifests_fit_their_schemas(name: str) -> None:
    for manifest in manifests(name):
        check(manifest)


@pytest.mark.parametrize("path", ["headGroupSpec.template.spec.containers.0.envFromm", "workerGroupSpecs.0.maxReplica", "authOption"])
def test_the_schemas_see_a_name_that_is_not_there(path: str) -> None:
    wrong = copy.deepcopy(next(one for one in manifests("ray-cluster.yaml") if one["kind"] == "RayCluster"))
    place: Any = wrong["spec"]
    *above, name = path.split(".")
    for part in above:
        place = place[int(part) if part.isdigit() else part]
    place[name] = "x"
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(wrong)


def test_the_job_has_the_groups_of_the_cluster() -> None:
    spec = manifests("ray-job.yaml")[0]["spec"]["rayClusterSpec"]
    pod = spec["headGroupSpec"]["template"]["spec"]
    assert pod.pop("volumes") and pod["containers"][0].pop("volumeMounts"), "the job file is all that the head has more"
    assert spec == spec_of_cluster()


def test_the_groups_hold_what_stages_ask_for_by_their_custom_resources() -> None:
    kinds = []
    for group in spec_of_cluster()["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        custom = yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"]))
        kinds.append(Nodes({"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0)), **custom}, group["maxReplicas"]))
    cluster = Cluster((), tuple(kinds))
    assert cluster.refusal(Ask("decode task", Resources(decoder_custom={"decoder": 1}).decoder)) is None
    assert cluster.refusal(Ask("training worker", Resources(cpus=8, gpus=1, custom={"trainer": 1}).worker, together=56)) is None
    assert cluster.refusal(Ask("decode task", {"CPU": 1, "GPU": 1, "decoder": 1})) is not None


def test_nothing_secret_stands_in_them_and_versions_are_those_of_the_package() -> None:
    lock = (FOLDER.parents[1] / "requirements.lock").read_text()
    version = re.search(r"^ray==(\S+)", lock, re.MULTILINE)
    assert version and spec_of_cluster()["rayVersion"] == version[1]
    for path in FOLDER.glob("*.yaml"):
        for manifest in manifests(path.name):
            assert manifest["kind"] != "Secret"
        assert not re.search(r"(?i)(password|token|secret_access_key)\"?, value: [^\"$]", path.read_text())


def test_the_container_file_passes_the_linter() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter, "hadolint comes with requirements.lock"
    found = subprocess.run([linter, str(FOLDER / "Containerfile")], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
