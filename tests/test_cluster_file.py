"""`ray_cluster.yaml` without a cloud: Ray's own schema, the nodes its autoscaler would launch for kinetok's work, and nothing secret."""

import copy
import logging
import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from kinetok.infra.capacity import Cluster, Nodes, addable_nodes
from kinetok.infra.stage import Ask, Resources

CLUSTER = Path(__file__).parents[1] / "ray_cluster.yaml"
DECODE = Resources(decoder_custom={"decoder": 1}).decoder
TRAIN = Resources(cpus=8, gpus=1, custom={"trainer": 1}).worker


def prepared() -> dict[str, object]:
    config: dict[str, object] = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    return config


def launched(demand: list[dict[str, float]], unavailable: tuple[str, ...] = ()) -> dict[str, int]:
    """What Ray's autoscaler would launch for `demand` on the empty cluster, by kind of node; recent launches of `unavailable` failed."""
    config = AutoscalingConfig(prepared(), skip_content_hash=True)
    kinds = config.get_node_type_configs()
    scores = {name: 0.0 if name in unavailable else 1.0 for name in kinds}
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=kinds,
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle) for bundle in demand]),
        cloud_resource_availabilities=scores,
        recoverable_resource_availabilities=scores,
    )
    reply = ResourceDemandScheduler(AutoscalerEventLogger(logging.getLogger(__name__))).schedule(request)
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "head"}


def test_ray_accepts_the_cluster_file() -> None:
    config = prepared()
    validate_config(copy.deepcopy(config))
    kinds = config["available_node_types"]
    assert isinstance(kinds, dict) and kinds["head"]["resources"] == {"CPU": 0}
    assert all(kind["min_workers"] == 0 for kind in kinds.values()), "both groups start at zero"


def test_the_autoscaler_buys_spot_first_and_falls_back() -> None:
    assert launched([DECODE] * 40) == {"decode_spot": 2}
    assert launched([TRAIN] * 9) == {"train_spot": 2}
    assert launched([DECODE] * 32 + [TRAIN] * 8) == {"decode_spot": 1, "train_spot": 1}
    assert launched([DECODE] * 40, unavailable=("decode_spot",)) == {"decode": 2}
    assert launched([TRAIN] * 8, unavailable=("train_spot",)) == {"train": 1}


def test_a_dry_start_on_simulated_aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `ray up` does before it has machines to talk to: fills in, makes a key and a security group, launches each kind of machine."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # the new key goes to ~/.ssh
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        boto3.client("iam").create_instance_profile(InstanceProfileName="kinetok-node")
        config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(prepared()))
        kinds = config["available_node_types"]
        assert kinds["train"]["resources"]["accelerator_type:A100"] == 1 and kinds["train"]["resources"]["memory"] > 800e9
        provider = AWSNodeProvider(config["provider"], "kinetok")
        for kind in kinds.values():
            provider.create_node(kind["node_config"], {}, 1)
        ec2 = boto3.client("ec2", "us-east-1")
        machines = [one for reservation in ec2.describe_instances()["Reservations"] for one in reservation["Instances"]]
        (group,) = [group for group in ec2.describe_security_groups()["SecurityGroups"] if group["GroupName"].startswith("ray-autoscaler")]
    assert sorted((one["InstanceType"], one.get("InstanceLifecycle", "on demand")) for one in machines) == [
        ("c7i.8xlarge", "on demand"),
        ("c7i.8xlarge", "spot"),
        ("m7i.2xlarge", "on demand"),
        ("p4d.24xlarge", "on demand"),
        ("p4d.24xlarge", "spot"),
    ]
    assert all(one["IamInstanceProfile"]["Arn"].endswith("/kinetok-node") for one in machines)
    open_to_all = [rule.get("FromPort") for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert open_to_all == [22], "strangers reach SSH alone"


def test_the_file_says_what_the_cluster_may_hold() -> None:
    cluster = Cluster((Nodes({"CPU": 0}),), tuple(addable_nodes(yaml.safe_dump(prepared()))))
    assert cluster.refusal(Ask("training worker", TRAIN, together=8 * 14)) is None
    assert "room for 112" in (cluster.refusal(Ask("training worker", TRAIN, together=113)) or "")
    assert "GPU 8 on the biggest node" in (cluster.refusal(Ask("model actor", {"GPU": 16})) or "")


@pytest.mark.parametrize("secret", [r"AKIA[0-9A-Z]{16}", r"(?i)(token|password|secret\w*)\s*[:=]\s*[^.\s]"])
def test_nothing_secret_stands_in_it(secret: str) -> None:
    told = [line for line in CLUSTER.read_text().splitlines() if not line.startswith("#")]
    assert not re.search(secret, "\n".join(told))
