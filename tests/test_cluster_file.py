"""`ray_cluster.yaml` against Ray's own schema, without a cloud."""

import copy
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[1] / "ray_cluster.yaml"


def test_ray_accepts_the_cluster_file() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
