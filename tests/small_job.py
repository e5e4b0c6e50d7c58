"""A job of seconds that has every kind of stage that writes in pieces: two rungs, features and tokens of drawn scenes."""

from typing import Any

CAUSAL = {"kind": "causal", "channels": 8, "mult": [1, 1, 2], "strides": [[2, 1], [2, 2]], "patch": 4, "blocks": 1, "groups": 4, "z": 8}
TRAIN = {"global_batch": 2, "checkpoint_every": 2, "eval_every": 4, "log_every": 1, "optimizers": {"autoencoder": {"lr": 1e-3}}}


def small_job(name: str, *, scenes: int, base_steps: int, grown_steps: int, **training: object) -> dict[str, Any]:
    """The job as a file would hold it, without a store; `training` changes what `TRAIN` says."""
    train: dict[str, Any] = {"kind": "train", "data": "clips", **TRAIN, **training}
    return {
        "name": name,
        "tracking": {"experiment": name},
        "resources": {"default": {"batch_size": 2}},
        "stages": {
            "scenes": {"kind": "scenes", "count": scenes, "size": 64, "seconds": 2.5, "real": False, "shard_videos": 3},
            "videos": {"kind": "ingest", "made_by": "scenes"},
            "clips": {
                "kind": "clips",
                "videos": "videos",
                "fps": 8,
                "frames": 9,
                "height": 32,
                "width": 32,
                "shard_clips": 4,
                "val_fraction": 0.3,
            },
            "base": {"model": CAUSAL, "steps": base_steps, **train},
            "trunk": {"kind": "encode", "data": "clips", "model": "base", "content": "features"},
            "grown": {
                "features": "trunk",
                "lower": "base",
                "model": {"kind": "grown", "blocks": 1, "groups": 4},
                "steps": grown_steps,
                **train,
            },
            "tokens": {"kind": "encode", "data": "clips", "model": "grown"},
        },
    }
