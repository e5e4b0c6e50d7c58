"""THE training loop: what a model must offer to be trained (`Trainable`), what feeds it (`Feed`), and the loop each worker runs.

Adversarial, diffusion and language-model training share this one loop: each optimizer of a job is a "player", a module whose
forward returns its loss. `backward` and `optimizer.step` of the whole repository stand here. All randomness of a step comes from
per-sample seeds in the batch, so that a resumed run, or one on another number of workers, draws the same numbers. Figures stay on
the device until a line is logged: a step never waits for the host. Not covered: starting the workers (`fit.py`).
"""

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor, distributed, nn

from kinetok.infra import checkpoint, meters
from kinetok.infra.checkpoint import Saved
from kinetok.infra.compiling import compile_parts
from kinetok.infra.engine import Engine, EngineSettings, make_engine
from kinetok.infra.errors import Cancelled, ConfigError, KinetokError, TrainingError
from kinetok.infra.fit import FitConfig, split
from kinetok.infra.metrics_log import MetricsLog
from kinetok.infra.optim import Average, local, lr_factor, named, whole
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.infra.turn import Watch, Wish

MODEL = "model"
SEEDS = "seed_B"

Batch: TypeAlias = dict[str, Tensor]
"""Named tensors whose first dimension is the sample; always holds `seed_B` (int64, on the CPU), the sample's own random seed."""


class Trainable(Protocol):
    """A model family's own part of training. Pure torch; knows nothing of workers, devices or files beyond `export`."""

    players: Mapping[str, nn.Module]
    """One optimizer each, stepped in this order. `player(batch, step)` returns (scalar loss, named scalars to log), `tokens` among them
    where a sample has a number of tokens.
    What a player does not train must not be a sub-module of it."""
    frozen: Mapping[str, nn.Module]
    """Moved to the device, hashed before and after training, never optimised, never in a checkpoint (contract 4)."""

    def active(self, player: str, step: int) -> bool:
        """Whether this player takes part in step `step` (a discriminator may start late)."""

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Per-sample validation figures, each (B,); called without gradient."""

    def digest(self, module: nn.Module) -> str:
        """Hash of a frozen module's weights, the one its token shards carry (`weights_digest` for tokenizers)."""

    def export(self, folder: Path) -> None:
        """Save the finished model with `save_pretrained`; the loop has put the weights to keep (EMA where configured) in place."""


@runtime_checkable
class Concluding(Protocol):
    """A trainable with validation figures that are no means over samples, such as a perplexity."""

    def conclude(self, means: Mapping[str, float]) -> dict[str, float]:
        """These figures, from the means of what `evaluate` gives."""


class Feed(Protocol):
    """An endless, seeded, position-addressed stream of samples. Pickled to the workers."""

    def __len__(self) -> int:
        """Samples of one epoch."""

    def batches(self, *, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        """This rank's micro-batches of `batch` samples, from global sample position `start` on.

        Micro-batch m of the job covers positions start + m*batch*world ... and rank r takes the r-th run of `batch` of them, so the
        global order does not depend on `world` as long as batch*world does not change.
        """


class Session(Protocol):
    """One worker's place among all workers; the process group is up."""

    rank: int
    local_rank: int
    world: int
    device: torch.device

    def latest(self) -> contextlib.AbstractContextManager[Path | None]:
        """The last committed checkpoint as a local folder, None before the first."""

    def report(self, step: int, folder: Path) -> None:
        """Hand in this rank's part of a checkpoint; returns when all ranks have. Called by all ranks alike."""

    def preempted(self) -> bool:
        """Whether a node of some rank will soon be taken away; the same answer on all ranks, which all ask alike."""


@dataclass(frozen=True)
class Work:
    """Everything a worker is sent."""

    build: Callable[[], Trainable]
    train: Feed
    validation: Feed | None
    config: FitConfig
    out: Folder
    resources: Resources
    turn: str
    """The call of `fit` it comes from."""
    start: Folder | None = None
    """The checkpoint that an earlier call left."""


class Agreed(Exception):
    """Carries an error that every rank raises alike: all can return, and none waits for a lost peer."""

    def __init__(self, cause: KinetokError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Loop:
    """One worker's side of a run, from the last committed checkpoint to the exported model.

    Evaluation and export see the weights to keep through `view`: the trained model itself, or where those weights are averages or
    are scattered by ZeRO-3, a second copy of it that they are gathered into.
    """

    def __init__(self, work: Work, session: Session) -> None:
        self.work, self.session, self.config = work, session, work.config
        self.first = session.rank == 0
        torch.set_num_threads(max(1, int(work.resources.cpus)))
        self.trainable = self._build()
        _check_players(self.trainable, self.config)
        self.frozen = self._digests()
        self.own = {name: [p for p in module.parameters() if p.requires_grad] for name, module in self.trainable.players.items()}
        self.view = self._build() if self.config.ema or work.resources.zero == 3 else self.trainable
        self._share()
        self.micro_batch, self.accumulation = split(self.config, work.resources, session.world)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.losses: list[tuple[int, str, Tensor]] = []
        self.engines, self.average, self.start = self._resume()

    def run(self) -> dict[str, str]:
        """Train to the end and export; returns the frozen modules' digests (rank 0). Raises Agreed on all ranks alike."""
        log = MetricsLog(self.work.out, after=self.start) if self.first else None
        batches = self.work.train.batches(
            start=self.start * self.config.global_batch,
            batch=self.micro_batch,
            rank=self.session.rank,
            world=self.session.world,
        )
        watch, warned = Watch(self.work.out, self.work.turn), False
        with watch.running() if self.first else contextlib.nullcontext():
            since, before, waited = time.perf_counter(), self.start, 0.0
            for step in range(self.start + 1, self.config.steps + 1):
                asked = time.perf_counter()
                fed = [self._to_device(next(batches)) for _ in range(self.accumulation)]
                waited += time.perf_counter() - asked
                self.step(step, fed)
                if not self._pauses(step):
                    continue
                values, wish = self.drain(step, watch.wish)
                samples, seconds = (step - before) * self.config.global_batch, time.perf_counter() - since
                values["train/samples_per_second"] = rate = samples / seconds
                meters.did(meters.stage_of(self.work.out), "train", samples=samples // self.session.world, seconds=seconds - waited)
                if "train/tokens" in values:
                    values["train/tokens_per_second"] = values["train/tokens"] * rate
                values |= self.evaluate() if self._evaluates(step) else {}
                if log is not None:
                    log.write(step, values)
                preempted = self.session.preempted()
                if step % self.config.checkpoint_every == 0 or wish is Wish.STOP or preempted > warned:
                    self._checkpoint(step, log)
                if wish is Wish.STOP:
                    raise Agreed(Cancelled(f"training was asked to stop at step {step}, and goes on from there"))
                warned = preempted
                since, before, waited = time.perf_counter(), step, 0.0
        if log is not None:
            log.flush()
        return self._export()

    def step(self, step: int, batches: list[Batch]) -> None:
        """One step of every active player on the same micro-batches, then of the average."""
        _seed(self.config.seed, step, self.session.rank)
        for player, engine in self.engines.items():
            if not self.trainable.active(player, step):
                continue
            self._only(player)
            self._set_lr(player, step)
            total = torch.zeros((), device=self.session.device)
            for batch in batches:
                loss, figures = engine(batch, step)
                engine.backward(loss)
                engine.step()
                total += loss.detach()
                self._note({f"train/{name}": value for name, value in figures.items()})
            self.losses.append((step, player, total / len(batches)))
        if self.average is not None:
            self.average.update(step)

    def drain(self, step: int, wish: Wish) -> tuple[dict[str, float], Wish]:
        """Figures since the last line, averaged over ranks, and the first rank's wish; raises on a loss not finite, or to give way."""
        names = sorted(self.sums)
        sums = [self.sums[name] / self.counts[name] for name in names]
        wished = torch.tensor(float(wish), device=self.session.device)
        vector = torch.stack([wished, *sums, *(loss for _, _, loss in self.losses)]).double()
        distributed.all_reduce(vector)
        agreed = Wish(round(vector[0].item()))  # the others wish for nothing
        figures = (vector[1:] / self.session.world).tolist()
        losses = [(at, player, loss) for (at, player, _), loss in zip(self.losses, figures[len(names) :], strict=True)]
        self.sums, self.counts, self.losses = {}, {}, []
        for at, player, loss in losses:
            if not np.isfinite(loss):
                raise Agreed(
                    TrainingError(
                        f"the loss of {player} is {loss} at step {at}: lower its learning rate ({self.config.optimizers[player].lr}), "
                        "lengthen the warm-up, or look at the samples of that step"
                    )
                )
        if agreed is Wish.GIVE_WAY:
            raise Agreed(Cancelled(f"training was asked to stop at step {step}: another run took over"))
        values = dict(zip(names, figures, strict=False))
        for player in self.engines:
            mine = [loss for _, name, loss in losses if name == player]
            if mine:
                values |= {f"train/{player}/loss": sum(mine) / len(mine), f"train/{player}/lr": self._lr(player, step)}
        return values, agreed

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """`val/...` figures of the weights to keep: exact means over the validation samples, whatever the number of ranks, and what follows
        from them."""
        feed, batch, world = self.work.validation, self.micro_batch, self.session.world
        if feed is None:
            return {}
        samples = len(feed) if self.config.eval_batches is None else min(len(feed), self.config.eval_batches * self.config.global_batch)
        batches = feed.batches(start=0, batch=batch, rank=self.session.rank, world=world)
        sums: dict[str, Tensor] = {}
        with self._viewing():
            for position in range(self.session.rank * batch, samples + self.session.rank * batch, batch * world):
                counted = min(max(samples - position, 0), batch)
                for name, values in self.view.evaluate(self._to_device(next(batches))).items():
                    sums[name] = sums.get(name, torch.zeros((), device=values.device)) + values[:counted].double().sum()
        names = sorted(sums)
        vector = torch.stack([sums[name] for name in names]).double()
        distributed.all_reduce(vector)
        figures = dict(zip(names, (vector / samples).tolist(), strict=True))
        if isinstance(self.view, Concluding):
            figures |= self.view.conclude(figures)
        return {f"val/{name}": value for name, value in figures.items()}

    def _build(self) -> Trainable:
        _seed(self.config.seed, 0, 0)
        trainable = self.work.build()
        for module in trainable.players.values():
            module.to(self.session.device).train()
        for module in trainable.frozen.values():
            module.to(self.session.device).eval().requires_grad_(False)
        if self.work.resources.compile:
            compile_parts([*trainable.players.values(), *trainable.frozen.values()])
        return trainable

    def _share(self) -> None:
        """Let `view` use the memory of whatever is not trained: frozen modules, and what a player leaves alone (a base under adapters)."""
        if self.view is self.trainable:
            return
        for name, module in self.trainable.frozen.items():
            for mine, theirs in zip(self.view.frozen[name].parameters(), module.parameters(), strict=True):
                mine.data = theirs.data
        trained = self._trained()
        mine_by_name = dict(named(self.view.players))
        for name, theirs in named(self.trainable.players):
            if id(theirs) not in trained:
                mine_by_name[name].data = theirs.data

    def _trained(self) -> set[int]:
        """Of every player's trained parameters; `requires_grad` tells them only until the first step of several players."""
        return {id(parameter) for parameters in self.own.values() for parameter in parameters}

    def _resume(self) -> tuple[dict[str, Engine], Average | None, int]:
        """Engines, average and the step they stand at; conversion must be known before the engines are made."""
        resources, players = self.work.resources, tuple(self.trainable.players)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(self.session.latest())
            saved = checkpoint.read_saved(folder) if folder else None
            universal = saved is not None and checkpoint.needs_conversion(saved, workers=self.session.world, zero=resources.zero)
            settings = EngineSettings(resources.zero, self.config.precision == "bf16", self.micro_batch, self.accumulation, universal)
            engines = {name: make_engine(module, self.config.optimizers[name], settings) for name, module in self.trainable.players.items()}
            average = Average(self.trainable.players, self.config.ema) if self.config.ema else None
            if folder is None or saved is None:
                return engines, average, 0
            if universal:
                folder = stack.enter_context(checkpoint.converted(folder, players, self.session.local_rank))
            checkpoint.restore(folder, engines, average)
            return engines, average, saved.step

    def _pauses(self, step: int) -> bool:
        """Whether figures are read after `step`; the same steps whether or not the run was interrupted, so the lines are too."""
        return step % self.config.log_every == 0 or step % self.config.checkpoint_every == 0 or self._evaluates(step)

    def _evaluates(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.steps

    def _only(self, player: str) -> None:
        """Keep a player's gradients out of the others' parameters, which its loss may run through."""
        if len(self.own) > 1:
            for name, parameters in self.own.items():
                for parameter in parameters:
                    parameter.requires_grad_(name == player)

    def _lr(self, player: str, step: int) -> float:
        config = self.config.optimizers[player]
        return config.lr * lr_factor(step, self.config.steps, config)

    def _set_lr(self, player: str, step: int) -> None:
        for group in self.engines[player].optimizer.param_groups:
            group["lr"] = group["rate"] * self._lr(player, step)

    def _note(self, figures: Mapping[str, Tensor]) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def _to_device(self, batch: Batch) -> Batch:
        """Seeds stay on the host: reading them back from a GPU would make every step wait for it."""
        return {name: tensor if name == SEEDS else tensor.to(self.session.device, non_blocking=True) for name, tensor in batch.items()}

    @contextlib.contextmanager
    def _viewing(self) -> Iterator[None]:
        """`view` holds the weights to keep, in eval mode and the precision of training."""
        self._gather()
        modules = self.view.players.values()
        for module in modules:
            module.eval()
        with torch.autocast(self.session.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            yield
        for module in modules:
            module.train()

    @torch.no_grad()
    def _gather(self) -> None:
        if self.view is self.trainable:
            return
        trained = self._trained()
        live = ((name, parameter) for name, parameter in named(self.trainable.players) if id(parameter) in trained)
        source = self.average.full() if self.average else ((name, whole(local(parameter), parameter)) for name, parameter in live)
        target = dict(named(self.view.players))
        for name, tensor in source:
            target[name].copy_(tensor)
        for player, module in self.trainable.players.items():
            for mine, theirs in zip(self.view.players[player].buffers(), module.buffers(), strict=True):
                mine.copy_(theirs)

    def _checkpoint(self, step: int, log: MetricsLog | None) -> None:
        """Lines reach the store before the checkpoint does, so that none is missing after a resume."""
        if log is not None:
            log.flush()
        with tempfile.TemporaryDirectory(prefix="kinetok-") as name:
            saved = Saved(step=step, workers=self.session.world, zero=self.work.resources.zero)
            checkpoint.save(Path(name), saved, self.engines, self.average)
            self.session.report(step, Path(name))

    def _export(self) -> dict[str, str]:
        """Check that the frozen modules are what they were, then save the model to `model/` in the store; returns their digests."""
        frozen = self._digests()
        changed = [", ".join(name for name in frozen if frozen[name] != self.frozen[name])]
        distributed.broadcast_object_list(changed)
        if changed[0]:
            raise Agreed(TrainingError(f"frozen modules changed during training: {changed[0]}; the model was not saved"))
        with self._viewing(), tempfile.TemporaryDirectory(prefix="kinetok-") as folder:
            if self.first:
                self.view.export(Path(folder))
                for path in sorted(Path(folder).rglob("*")):
                    if path.is_file():
                        self.work.out.put_file(path, f"{MODEL}/{path.relative_to(folder)}")
        return frozen

    def _digests(self) -> dict[str, str]:
        return {name: self.trainable.digest(module) for name, module in self.trainable.frozen.items()} if self.first else {}


def _check_players(trainable: Trainable, config: FitConfig) -> None:
    if set(trainable.players) != set(config.optimizers):
        raise ConfigError(f"optimizers name {sorted(config.optimizers)}, the model trains {sorted(trainable.players)}")
    owner: dict[int, str] = {}
    for name, module in (*trainable.frozen.items(), *trainable.players.items()):
        for parameter in module.parameters():
            other = owner.setdefault(id(parameter), name)
            if other != name:
                raise TrainingError(f"{other} and {name} share parameters: a frozen module or another player must not be a sub-module")


def _seed(seed: int, step: int, rank: int) -> None:
    """Seed what a model may draw beside its per-sample seeds, from the step alone: no generator state needs saving."""
    mixed = (seed * 1_000_003 + step) * 1_009 + rank
    torch.manual_seed(mixed)
    np.random.seed(mixed % 2**32)
    random.seed(mixed)
