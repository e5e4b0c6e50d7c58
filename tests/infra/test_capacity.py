"""What can never be held is refused with what is asked beside what there is; what may come is waited for, and told."""

from pathlib import Path

import pytest

from kinetok.infra import capacity
from kinetok.infra.capacity import Cluster, Nodes, addable_nodes
from kinetok.infra.errors import ConfigError
from kinetok.infra.stage import Ask, Resources

HEAD, DECODE, TRAIN = (
    Nodes({"memory": 8e9}),
    Nodes({"CPU": 32, "memory": 64e9, "decoder": 1e6}),
    Nodes({"CPU": 8, "GPU": 4, "trainer": 1e6}),
)
STATIC = Cluster((HEAD, DECODE, DECODE, TRAIN))


def test_what_fits_is_not_refused() -> None:
    held = [
        Ask("decode task", Resources(decoder_custom={"decoder": 1}).decoder),
        Ask("training worker", Resources(gpus=1, custom={"trainer": 1}).worker, together=4),
        Ask("model actor", Resources(gpus=0.25).worker, together=8),
        Ask("nothing", {}, together=1000),
    ]
    assert [STATIC.refusal(ask) for ask in held] == [None] * 4


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (
            Ask("training worker", Resources(gpus=8, cpus=4).worker, together=2),
            "asks for 2 x training worker of 4 CPU, 8 GPU, which no node can hold: "
            "CPU 32 on the biggest node and 72 in the whole cluster, GPU 4 on the biggest node and 4 in the whole cluster",
        ),
        (
            Ask("training worker", Resources(gpus=1, cpus=1).worker, together=5),
            "asks for 5 x training worker of 1 CPU, 1 GPU at once, the whole cluster has room for 4",
        ),
        (
            Ask("model actor", Resources(memory=100e9, accelerator="H100").worker),
            "asks for 1 x model actor of 1 CPU, 100.0 GB memory, H100, which no node can hold: "
            "CPU 32 on the biggest node and 72 in the whole cluster, memory 64.0 GB on the biggest node and 136.0 GB in the whole cluster, "
            "H100 0 on the biggest node and 0 in the whole cluster",
        ),
        (Ask("decode task", {"CPU": 16, "trainer": 1}), "asks for 1 x decode task of 16 CPU, 1 trainer, which no node can hold: "),
    ],
)
def test_a_refusal_sets_what_is_asked_beside_what_there_is(ask: Ask, said: str) -> None:
    assert (STATIC.refusal(ask) or "").startswith(said)


def test_an_autoscaling_cluster_is_judged_by_what_it_may_add() -> None:
    empty = (HEAD,)
    kinds = tuple(
        addable_nodes(
            "{max_workers: 9, head_node_type: head, available_node_types: {head: {resources: {CPU: 0}}, "
            "decode: {resources: {CPU: 32}}, train: {resources: {CPU: 96, GPU: 8}, max_workers: 2}}}"
        )
    )
    assert [kind.count for kind in kinds] == [1, 9, 2]
    scaling = Cluster(empty, kinds)
    assert scaling.total("CPU") == 9 * 32 + 2 * 96 and scaling.total("GPU") == 16
    assert scaling.refusal(Ask("training worker", {"CPU": 12, "GPU": 1, "memory": 1e12}, together=16)) is None
    assert "room for 16" in (scaling.refusal(Ask("training worker", {"GPU": 1}, together=17)) or "")
    unseen = Cluster(empty, grows_unseen=True)
    assert unseen.refusal(Ask("training worker", {"GPU": 64})) is None


def test_groups_share_nodes_where_a_node_has_both_resources() -> None:
    assert not STATIC.share({"decoder": 1}, {"trainer": 1})
    assert STATIC.share({"trainer": 1}, {})
    assert STATIC.total("CPU", beside={"decoder": 1}) == 64


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"workers": 4, "max_workers": 2}, "max_workers 2 is less than workers 4"),
        ({"custom": {"GPU": 1}}, "custom resource 'GPU': Ray itself counts that one; say cpus, gpus, memory or accelerator"),
        ({"decoder_custom": {"node:10.0.0.1": 1}}, "custom resource 'node:10.0.0.1'"),
        ({"custom": {"trainer": 0}}, "greater than 0"),
    ],
)
def test_resources_that_cannot_be_meant(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Resources.model_validate(wrong)


@pytest.mark.ray
def test_a_real_cluster_refuses_and_says_what_waits(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    assert capacity.look().total("CPU") == 4
    capacity.require({"base": [Ask("training worker", Resources().worker, together=4)]})
    with pytest.raises(ConfigError, match=r"base asks for 1 x training worker of 1 CPU, 1 GPU, which no node can hold: .* GPU 0 on the"):
        capacity.require({"base": [Ask("training worker", Resources(gpus=1).worker)]})
    room, wants = tmp_path / "go", Ask("model actor", {"CPU": 3.0})

    @ray.remote(num_cpus=3)
    def hold() -> None:
        while not room.exists():
            pass

    tasks = [hold.remote(), hold.remote()]
    while not (said := capacity.waiting([wants, Ask("decode task", {"CPU": 2.0})])):
        pass
    room.touch()
    ray.get(tasks)
    assert said == "waits for room for model actor of 3 CPU"
    while capacity.waiting([wants]):
        pass
