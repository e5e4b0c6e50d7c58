"""The training loop against plain torch, and against itself: other worker counts, other ZeRO stages, interrupted.

Workers are two long-lived processes with a gloo group, so that one start-up serves all scenarios; Ray Train itself is in test_fit.py.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kinetok.infra import compiling, training
from kinetok.infra.engine import Engine, EngineSettings, make_engine
from kinetok.infra.errors import Cancelled, ConfigError, TrainingError
from kinetok.infra.fit import TURN, FitConfig, PlayerConfig
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.optim import local, whole
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.infra.training import Agreed, Batch, Loop, Work
from kinetok.infra.turn import STOPPED

pytestmark = pytest.mark.usefixtures("process_group")


BASE = 0.54321


class Regressor(nn.Module):
    """Player: fits y = sum of the inputs, seen through a frozen rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == self.__dict__.get("nan_at"):
            return self.net(batch["x"]).mean() * float("nan"), {}
        error = self.net(batch["x"]).squeeze(1) - batch["y"]
        return error.pow(2).mean(), {"l1": error.abs().mean()}


class Toy:
    """One player and one frozen module."""

    def __init__(self, *, nan_at: int = 0) -> None:
        self.frozen = {"lower": nn.Linear(6, 6, bias=False)}
        self.frozen["lower"].weight.data.fill_(0.12345)
        player = Regressor()
        player.__dict__["nan_at"] = nan_at
        self.players: dict[str, nn.Module] = {"model": player}

    def active(self, player: str, step: int) -> bool:
        return True

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        return {"error": (self.players["model"].net(batch["x"]).squeeze(1) - batch["y"]).abs()}

    def digest(self, module: nn.Module) -> str:
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.state_dict().values())).hexdigest()

    def export(self, folder: Path) -> None:
        save_file(self.players["model"].state_dict(), folder / "model.safetensors")


class Adapted(Toy):
    """Its player stands on a base of its own that is frozen, as a language model under adapters does."""

    def __init__(self) -> None:
        super().__init__()
        base = nn.Linear(6, 6, bias=False).requires_grad_(False)
        base.weight.data.copy_(torch.eye(6) * BASE)
        self.players["model"].net.insert(0, base)


class Part(nn.Sequential):
    """Says that it is worth compiling."""

    worth_compiling: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Fast(Toy):
    """Has such a part."""

    def __init__(self) -> None:
        super().__init__()
        self.players["model"].net = Part(*self.players["model"].net)


class Squared(Toy):
    """Has a figure that is no mean over samples."""

    def conclude(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"squared": means["error"] ** 2}


class Critic(nn.Module):
    """Player: tells real samples (label 1) from the generator's (label 0)."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1))
        self.other = (generator,)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self.other[0].net(batch["x"])
        return (self.net(fake).pow(2) + (self.net(batch["x"]) - 1).pow(2)).mean(), {}


class Generator(nn.Module):
    """Player: is judged by the critic, which it does not own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 6)
        self.critic: tuple[nn.Module, ...] = ()

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.critic[0].net(self.net(batch["x"])) - 1).pow(2).mean(), {}


class Adversaries(Toy):
    """Two players whose losses run through each other; the critic starts at step 3."""

    def __init__(self) -> None:
        generator = Generator()
        critic = Critic(generator)
        generator.critic = (critic,)
        self.frozen = {}
        self.players = {"generator": generator, "critic": critic}

    def active(self, player: str, step: int) -> bool:
        return player == "generator" or step >= 3

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        return {"score": self.players["critic"].net(self.players["generator"].net(batch["x"])).squeeze(1)}

    def export(self, folder: Path) -> None:
        save_file({f"{k}.{n}": t for k, m in self.players.items() for n, t in m.state_dict().items()}, folder / "model.safetensors")


@dataclass
class Numbers:
    """Feed of fixed random samples in rising order."""

    samples: int = 37
    seen: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.samples

    def batches(self, *, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        x = torch.randn(self.samples, 6, generator=torch.Generator().manual_seed(1))
        position = start + rank * batch
        while True:
            rows = torch.arange(position, position + batch) % self.samples
            yield {"x": x[rows], "y": x[rows].sum(1), "seed_B": rows}
            position += batch * world


CONFIG = FitConfig(
    steps=12,
    global_batch=8,
    optimizers={"model": PlayerConfig(lr=0.02, warmup=3, weight_decay=0.1, rates={"net": 0.5})},
    ema=0.9,
    eval_every=6,
    checkpoint_every=4,
    log_every=2,
)


class FolderSession:
    """A `Session` that commits checkpoints by copying them below one folder; `until` stops the run after that step's checkpoint."""

    def __init__(self, folder: Path, rank: int, world: int, until: int = 0, notice: int = 0) -> None:
        self.folder, self.rank, self.local_rank, self.world, self.until = folder, rank, rank, world, until
        self.asked, self.notice = 0, notice
        self.device = torch.device("cpu")

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        found = sorted(self.folder.glob("step-*"))
        yield found[-1] if found else None

    def report(self, step: int, folder: Path) -> None:
        shutil.copytree(folder, self.folder / f"step-{step:04d}", dirs_exist_ok=True)
        torch.distributed.barrier()
        if step == self.until:
            raise Interrupted

    def preempted(self) -> bool:
        """From the `notice`-th time on that it is asked."""
        self.asked += 1
        return 0 < self.notice <= self.asked


class Interrupted(Exception):
    """Stands for a kill."""


def run_loop(
    folder: Path,
    rank: int,
    world: int,
    build: Any,
    config: FitConfig,
    resources: dict[str, Any],
    until: int = 0,
    *,
    turn: str = "mine",
    present: str = "mine",
    notice: int = 0,
) -> None:
    """One worker's run; ends quietly where `until` interrupts it."""
    out = Folder(str(folder))
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    sizes = {"batch_size": 2, "workers": world} | resources
    work = Work(build, Numbers(), Numbers(11), config, out, Resources(**sizes), turn)
    out.write_text(TURN, present)
    with contextlib.suppress(Interrupted):
        try:
            Loop(work, FolderSession(folder / "checkpoints", rank, world, until, notice)).run()
        except Agreed as error:
            raise error.cause from error


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses(folder: Path, name: str = "train/model/loss") -> dict[int, float]:
    return {int(line["step"]): line[name] for line in read_metrics(Folder(str(folder))) if name in line}


@pytest.fixture(scope="module")
def pair(ray_cluster: None) -> Iterator[Any]:
    """Calls `run_loop` on two ranks at once."""
    import ray
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    port = free_port()
    ranks = [ray.remote(Rank).remote(rank, port) for rank in range(2)]

    def run(folder: Path, *args: Any) -> None:
        ray.get([rank.run.remote(folder, *args) for rank in ranks])

    yield run
    for rank in ranks:
        ray.kill(rank)
    cloudpickle.unregister_pickle_by_value(module)


class Rank:
    """One of two processes with a gloo group between them."""

    def __init__(self, rank: int, port: int) -> None:
        self.rank = rank
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.distributed.init_process_group("gloo")

    def run(self, folder: Path, *args: Any) -> None:
        run_loop(folder, self.rank, 2, *args)


def alone_run(folder: Path, build: Any = Toy, config: FitConfig = CONFIG, resources: Any = None, until: int = 0) -> Path:
    run_loop(folder, 0, 1, build, config, resources or {}, until)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    clock = {"time", "train/samples_per_second"}
    return [{name: value for name, value in line.items() if name not in clock} for line in read_metrics(Folder(str(folder)))]


def assert_same(one: Path, other: Path, *, exactly: bool) -> None:
    """The two runs logged the same and saved the same model."""
    tolerance = 0.0 if exactly else 2e-5
    mine, theirs = lines(one), lines(other)
    assert [sorted(line) for line in mine] == [sorted(line) for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    torch.testing.assert_close(weights(one), weights(other), rtol=tolerance, atol=tolerance)


def test_equals_a_loop_written_by_hand(tmp_path: Path) -> None:
    alone_run(tmp_path)
    torch.manual_seed(12345)
    toy = Toy()
    toy.players["model"].load_state_dict(start_weights(Toy, "model"))
    net = toy.players["model"].net
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = [{"params": [p], "weight_decay": 0.1 * (p.ndim == 2)} for p in net.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95))
    samples = Numbers().batches(start=0, batch=8, rank=0, world=1)
    expected: list[float] = []
    for step in range(1, 13):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * 0.02 * (step / 3 if step <= 3 else (1 + math.cos(math.pi * (step - 4) / 9)) / 2)
        loss, _ = toy.players["model"](next(samples), step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in net.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    pairs = [(a + b) / 2 for a, b in zip(expected[::2], expected[1::2], strict=True)]
    assert list(losses(tmp_path).values()) == pytest.approx(pairs, rel=1e-5)
    assert pairs[-1] < pairs[0]
    torch.testing.assert_close(weights(tmp_path), {f"net.{name}": p for name, p in average.items()}, rtol=1e-4, atol=1e-5)
    net.load_state_dict(average)
    batch = next(Numbers(11).batches(start=0, batch=11, rank=0, world=1))
    assert losses(tmp_path, "val/error")[12] == pytest.approx(toy.evaluate(batch)["error"].mean().item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile hides it by itself
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_compiling_changes_no_figure_and_no_weight(tmp_path: Path, zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that is trained and the copy that its average is evaluated in; the frozen digest is that of plain weights."""
    ran: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        def run(*args: Any) -> Any:
            ran.append(graph)
            return graph(*args)

        return run

    monkeypatch.setattr(compiling, "BACKEND", backend)
    alone_run(tmp_path / "compiled", Fast, resources={"zero": zero, "compile": True})
    assert len(ran) == 12 * 4 + 2 * 6, "four micro-batches of each of twelve steps, and two evaluations of eleven samples"
    assert_same(alone_run(tmp_path / "eager", Fast, resources={"zero": zero}), tmp_path / "compiled", exactly=True)


def test_figures_that_are_no_means_follow_from_them(tmp_path: Path) -> None:
    alone_run(tmp_path, Squared)
    errors, squares = losses(tmp_path, "val/error"), losses(tmp_path, "val/squared")
    assert squares.keys() == errors.keys() != set() and all(squares[step] == errors[step] ** 2 for step in errors)


def start_weights(build: Any, player: str) -> dict[str, Tensor]:
    """The weights a run begins with, whatever was drawn before it."""
    training._seed(CONFIG.seed, 0, 0)
    return build().players[player].state_dict()


@pytest.mark.ray
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_workers_equal_one(pair: Any, tmp_path: Path, zero: int) -> None:
    pair(tmp_path / "two", Toy, CONFIG, {"zero": zero})
    assert_same(alone_run(tmp_path / "one"), tmp_path / "two", exactly=False)


@pytest.mark.ray
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_resume_is_exact(pair: Any, tmp_path: Path, zero: int) -> None:
    pair(tmp_path / "whole", Toy, CONFIG, {"zero": zero})
    pair(tmp_path / "parts", Toy, CONFIG, {"zero": zero}, 4)
    stray = {"step": 6, "time": 0.0, "train/model/loss": 99.0}
    (tmp_path / "parts" / "metrics" / "000000006.jsonl").write_text(json.dumps(stray) + "\n")
    pair(tmp_path / "parts", Toy, CONFIG, {"zero": zero})
    assert_same(tmp_path / "whole", tmp_path / "parts", exactly=True)


@pytest.mark.ray
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_resume_on_another_worker_count(pair: Any, tmp_path: Path, zero: int) -> None:
    pair(tmp_path / "shrunk", Toy, CONFIG, {"zero": zero}, 4)
    alone_run(tmp_path / "shrunk", resources={"zero": zero}, until=8)
    pair(tmp_path / "shrunk", Toy, CONFIG, {"zero": zero})
    assert_same(alone_run(tmp_path / "whole"), tmp_path / "shrunk", exactly=False)


@pytest.mark.ray
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_players_frozen_base_takes_no_checkpoint_space(pair: Any, tmp_path: Path, zero: int) -> None:
    """Saved by two workers, continued by one and then by two: the base is there again, and was in no file."""
    pair(tmp_path / "parts", Adapted, CONFIG, {"zero": zero}, 4)
    pattern = (torch.eye(6) * BASE)[0].numpy().tobytes()
    assert all(pattern not in path.read_bytes() for path in (tmp_path / "parts" / "checkpoints").rglob("*") if path.is_file())
    alone_run(tmp_path / "parts", Adapted, resources={"zero": zero}, until=8)
    pair(tmp_path / "parts", Adapted, CONFIG, {"zero": zero})
    assert_same(alone_run(tmp_path / "whole", Adapted), tmp_path / "parts", exactly=False)
    torch.testing.assert_close(weights(tmp_path / "parts")["net.0.weight"], torch.eye(6) * BASE, rtol=0, atol=0)


@pytest.mark.parametrize(("zero", "ema"), [(0, 0.9), (2, 0.9), (3, 0.9), (3, None)])
def test_a_players_frozen_base_is_there_once(tmp_path: Path, zero: int, ema: float | None) -> None:
    """A base of 7 billion weights has no room for another one, be it only to evaluate the average."""
    out = Folder(str(tmp_path))
    config = CONFIG.model_copy(update={"ema": ema})
    work = Work(Adapted, Numbers(), Numbers(11), config, out, Resources(batch_size=2, zero=zero), "mine")
    built: list[nn.Module] = []

    class Watched(Loop):
        def _share(self) -> None:
            super()._share()
            built.extend(trainable.players["model"].net[0] for trainable in (self.trainable, self.view))
            assert built[0].weight.data_ptr() == built[1].weight.data_ptr() != 0

    loop = Watched(work, FolderSession(tmp_path, 0, 1))
    assert loop.view is not loop.trainable
    loop.step(1, [next(Numbers().batches(start=0, batch=2, rank=0, world=1)) for _ in range(4)])
    loop.evaluate()
    first, second = (trainable.players["model"].net for trainable in (loop.trainable, loop.view))
    torch.testing.assert_close(second[0].weight.data, torch.eye(6) * BASE, rtol=0, atol=0)
    kept = dict(loop.average.full())["model.net.1.weight"] if loop.average else whole(local(first[1].weight), first[1].weight)
    assert torch.equal(second[1].weight, kept) and (kept - start_weights(Adapted, "model")["net.1.weight"]).abs().max() > 1e-4
    if zero < 3:
        assert first[0].weight.data_ptr() == second[0].weight.data_ptr()
        assert first[1].weight.data_ptr() != second[1].weight.data_ptr()


@pytest.mark.ray
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_players_do_not_leak_into_each_other(pair: Any, tmp_path: Path, zero: int) -> None:
    config = CONFIG.model_copy(update={"optimizers": {name: PlayerConfig(lr=0.01) for name in ("generator", "critic")}, "ema": None})
    pair(tmp_path, Adversaries, config, {"zero": zero})
    toy = Adversaries()
    for name, module in toy.players.items():
        module.load_state_dict(start_weights(Adversaries, name))
    optimizers = {name: torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0) for name, module in toy.players.items()}
    samples = Numbers().batches(start=0, batch=8, rank=0, world=1)
    for step, batch in zip(range(1, 13), samples, strict=False):
        for name in ("generator", "critic"):
            if not toy.active(name, step):
                continue
            optimizers[name].param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * (step - 1) / 12)) / 2
            optimizers[name].zero_grad()
            toy.players[name](batch, step)[0].backward()
            torch.nn.utils.clip_grad_norm_(toy.players[name].parameters(), 1.0)
            optimizers[name].step()
    expected = {f"{k}.{n}": t for k, m in toy.players.items() for n, t in m.state_dict().items()}
    torch.testing.assert_close(weights(tmp_path), expected, rtol=1e-4, atol=1e-5)


def test_loss_that_is_not_finite_names_step_and_player(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="loss of model is nan at step 7"):
        alone_run(tmp_path, functools.partial(Toy, nan_at=7))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0004"]
    assert not (tmp_path / "model").exists()


def test_frozen_weights_are_watched_and_in_no_checkpoint(tmp_path: Path) -> None:
    alone_run(tmp_path, until=4)
    pattern = torch.full((6, 6), 0.12345).numpy().tobytes()
    assert all(pattern not in path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())

    class Melting(Toy):
        def active(self, player: str, step: int) -> bool:
            self.frozen["lower"].weight.data[0, 0] += 1e-6
            return True

    with pytest.raises(TrainingError, match="frozen modules changed during training: lower"):
        alone_run(tmp_path / "melting", Melting)


ENDLESS = CONFIG.model_copy(update={"steps": 10**6, "checkpoint_every": 10**6})


def test_writes_nothing_when_another_turn_began(tmp_path: Path) -> None:
    with pytest.raises(Cancelled, match="another run took over"):
        run_loop(tmp_path, 0, 1, Toy, ENDLESS, {}, turn="another")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_leaves_a_checkpoint_when_asked_to_stop(tmp_path: Path) -> None:
    with pytest.raises(Cancelled, match="goes on from there") as stopped:
        run_loop(tmp_path, 0, 1, Toy, ENDLESS, {}, present=f"mine{STOPPED}")
    (left,) = (tmp_path / "checkpoints").iterdir()
    assert f"at step {int(left.name.removeprefix('step-'))}," in str(stopped.value)


def test_a_notice_of_preemption_is_answered_by_one_checkpoint(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"checkpoint_every": 100})
    run_loop(tmp_path, 0, 1, Toy, config, {}, notice=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0004"], "the second pause; each is asked once"
    alone_run(tmp_path / "calm", config=config)
    assert_same(tmp_path / "calm", tmp_path, exactly=True)


def test_another_number_of_workers_takes_a_micro_batch_that_divides(tmp_path: Path) -> None:
    alone_run(tmp_path / "one", resources={"workers": 3, "batch_size": 3, "max_workers": 4})
    assert_same(alone_run(tmp_path / "plain"), tmp_path / "one", exactly=False)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_bf16_keeps_weights_in_fp32(tmp_path: Path, zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[nn.Module] = []

    def kept(module: nn.Module, player: PlayerConfig, settings: EngineSettings) -> Engine:
        modules.append(module)
        return make_engine(module, player, settings)

    monkeypatch.setattr(training, "make_engine", kept)
    config = CONFIG.model_copy(update={"precision": "bf16"})
    alone_run(tmp_path / "bf16", config=config, resources={"zero": zero})
    parameters = [parameter for module in modules for parameter in module.parameters()]
    assert parameters and not any(hasattr(parameter, "comm_dtype") for parameter in parameters), "gradients travel in fp32 too"
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}
    exact, rounded = losses(alone_run(tmp_path / "fp32")), losses(tmp_path / "bf16")
    assert rounded != exact
    assert list(rounded.values()) == pytest.approx(list(exact.values()), rel=0.05)


def test_refuses_what_it_could_not_keep_apart(tmp_path: Path) -> None:
    class Owning(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.players["model"].lower = self.frozen["lower"]

    with pytest.raises(TrainingError, match="share parameters"):
        alone_run(tmp_path, Owning)
    with pytest.raises(ConfigError, match=r"optimizers name \['modle'\], the model trains \['model'\]"):
        alone_run(tmp_path, config=CONFIG.model_copy(update={"optimizers": {"modle": PlayerConfig(lr=1.0)}}))


def test_another_zero_stage_is_refused(tmp_path: Path) -> None:
    alone_run(tmp_path, until=4)
    with pytest.raises(TrainingError, match="written with ZeRO 0 and cannot be continued with ZeRO 1"):
        alone_run(tmp_path, resources={"zero": 1})
