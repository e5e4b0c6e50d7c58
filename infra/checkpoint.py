"""Checkpoints of a training run: one folder with every player's DeepSpeed state, the averaged weights and `state.json`.

Restoring on another number of workers converts DeepSpeed's shards to its universal format first; at ZeRO 0 nothing is sharded and
nothing needs converting. Frozen modules are no players and so are never in here; nor are the frozen parameters of a player that is alone
(a base model under adapters), which it is built with. Which checkpoint counts is said by Ray Train's own
snapshot, which it writes once all workers have reported: a folder on disk that the snapshot does not list was never committed.
"""

import argparse
import contextlib
import io
import json
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from kinetok.infra.config import Config
from kinetok.infra.engine import Engine
from kinetok.infra.errors import StoreError, TrainingError
from kinetok.infra.optim import Average
from kinetok.infra.storage import Folder

STATE = "state.json"
AVERAGE = "average.safetensors"
TAG = "state"
CLAIMS = 5
"""Attempts to move a checkpoint that dying workers may delete at the same time."""
SNAPSHOT = "checkpoint_manager_snapshot.json"


class Saved(Config):
    """What must be known of a checkpoint before engines are made."""

    step: int
    """Steps taken; the data position is step * global_batch."""
    workers: int
    zero: int


def save(folder: Path, saved: Saved, engines: Mapping[str, Engine], average: Average | None) -> None:
    """Write this rank's part into its own `folder`; the parts of all ranks together are the checkpoint. A collective."""
    # Of several players all but one look frozen at any time: the loop keeps gradients out of them.
    alone = len(engines) == 1
    for player, engine in engines.items():
        engine.save_checkpoint(str(folder / player), tag=TAG, save_latest=False, exclude_frozen_parameters=alone)
    first = distributed.get_rank() == 0
    if average is not None:
        full = {name: tensor.cpu().contiguous() for name, tensor in average.full() if first}
        if first:
            save_file(full, folder / AVERAGE)
    if first:
        (folder / STATE).write_text(saved.model_dump_json())


def read_saved(folder: Path) -> Saved:
    """The header of the checkpoint in `folder`."""
    return Saved.model_validate_json((folder / STATE).read_text())


def restore(folder: Path, engines: Mapping[str, Engine], average: Average | None) -> None:
    """Load what `save` wrote, or what `converted` made of it, into engines and average. A collective."""
    for player, engine in engines.items():
        own = [{name: group[name] for name in ("weight_decay", "rate")} for group in engine.optimizer.param_groups]
        whole = all(parameter.requires_grad for parameter in engine.module.parameters())
        path, _ = engine.load_checkpoint(str(folder / player), tag=TAG, load_module_strict=whole)
        if path is None:
            raise TrainingError(f"{folder} holds no state of the player {player!r}: the model changed under a running job; use --force")
        _separate(engine.optimizer, own)
    if average is not None:
        average.load(load_file(folder / AVERAGE))


def _separate(optimizer: torch.optim.Optimizer, own: list[dict[str, float]]) -> None:
    """Undo what loading the universal format does at ZeRO 3: every group gets the numbers of the first and one step counter is shared by
    all, which then runs ahead."""
    for group, numbers in zip(optimizer.param_groups, own, strict=True):
        group.update(numbers)
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = state["step"].to(parameter.device, copy=True)  # where the fused kernel reads it


def needs_conversion(saved: Saved, *, workers: int, zero: int) -> bool:
    """Whether `saved` must be converted to be continued by `workers` at ZeRO `zero`; refuses another ZeRO stage."""
    if saved.zero != zero:
        raise TrainingError(
            f"the checkpoint was written with ZeRO {saved.zero} and cannot be continued with ZeRO {zero}: "
            f"set zero: {saved.zero}, or begin again with --force"
        )
    return zero > 0 and saved.workers != workers


@contextlib.contextmanager
def converted(folder: Path, players: tuple[str, ...], local_rank: int) -> Iterator[Path]:
    """A temporary copy of the checkpoint in DeepSpeed's universal format, made once on every node. A collective."""
    name = [uuid.uuid4().hex]
    distributed.broadcast_object_list(name)
    target = Path(tempfile.gettempdir()) / f"kinetok-universal-{name[0]}"
    with contextlib.ExitStack() as stack:
        if local_rank == 0:
            target.mkdir()
            stack.callback(_remove, target)
            for player in players:
                _to_universal(folder / player / TAG, target / player / TAG)
            if (folder / AVERAGE).exists():
                (target / AVERAGE).symlink_to(folder / AVERAGE)
        distributed.barrier()
        yield target
        distributed.barrier()


def _to_universal(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(source),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


def _remove(folder: Path) -> None:
    Folder(str(folder.parent)).remove(folder.name)


def committed(runs: Folder) -> Folder | None:
    """The last checkpoint that Ray Train committed in the newest of `runs` that has any. Run names sort by age."""
    for run in sorted(runs.folders(), reverse=True):
        try:
            latest = json.loads((runs / run).read_bytes(SNAPSHOT))["latest_checkpoint_result"]
        except FileNotFoundError:
            continue
        found = None if latest is None else runs / run / str(latest["checkpoint_dir_name"])
        if found is not None and found.exists(STATE):
            return found
    return None


def claim(runs: Folder, starts: Folder, turn: str) -> Folder | None:
    """Move the last committed checkpoint to `starts/{turn}`, delete all else in both folders, and return the checkpoint to begin from.

    Workers of a killed driver may live on for seconds, commit more and delete what they take for theirs: moved, it is out of their reach.
    """
    found = committed(runs)
    for _ in range(CLAIMS):
        if found is None or _moved(found, starts / turn):
            break
        starts.remove(turn)  # half a copy
        found = committed(runs)
    for run in runs.folders():
        # Where a dying worker still writes, the next call or publishing deletes the rest.
        with contextlib.suppress(StoreError):
            runs.remove(run)
    whole = [name for name in starts.folders() if (starts / name).exists(STATE)]
    for name in starts.folders():
        if name not in whole[-1:]:
            starts.remove(name)
    return starts / whole[-1] if whole else None


def _moved(source: Folder, target: Folder) -> bool:
    """One rename, or on an object store a copy that is whole once `STATE` is there; False where `source` was deleted meanwhile."""
    try:
        if source.is_local:
            target.local.parent.mkdir(parents=True, exist_ok=True)
            source.local.rename(target.local)
        else:
            source.copy(target, last=STATE)
    except FileNotFoundError:
        return False
    return True
