"""Starting Ray, or joining the cluster that `RAY_ADDRESS` names. The only module that calls `ray.init`.

On this machine a private cluster is started with as many CPUs as there are cores; its dashboard is off. Environment defaults that
Ray reads at start-up are set here, before it is imported.
"""

import os
import tempfile
from pathlib import Path

RAY_DEFAULTS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def start_ray(*, cpus: int | None = None) -> None:
    """Join `RAY_ADDRESS` if set, else start a local cluster with `cpus` (default: the machine's cores); a second call does nothing."""
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
        num_cpus=cpus or os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=_short_folder(),
    )


def _short_folder() -> str:
    """Ray's socket paths must stay under 107 bytes, so its session folder is not put below a long TMPDIR."""
    folder = Path(tempfile.gettempdir())
    return str((folder if len(str(folder)) < 40 else Path("/tmp")) / "ray")
