"""Every exception kinetok raises on purpose, in one tree.

KinetokError
├── ConfigError (ValueError)      a job file or an option is wrong; names the path and the nearest valid name
├── DataError (ValueError)        a source, clip index or shard cannot be used as asked
│   └── ContractError             token shards and the tokenizer told to use them disagree (contract 3)
├── StoreError (RuntimeError)     an artifact is missing, torn or changed
│   └── LeaseLost                 another run took over the artifact that this run was building
├── QuarantineLimit (RuntimeError)  more bad samples than the stage allows
├── TrainingError (RuntimeError)  training cannot start, continue or be trusted (non-finite loss, frozen weights moved)
├── ClusterError (RuntimeError)   a Ray cluster cannot be reached, or does not take or know a job
└── Cancelled (RuntimeError)      the run was asked to stop

Three more are defined where they are raised: BadVideo and DamagedShard (DataErrors of the data plane), TrackingDown (`mlflow_store.py`).

Messages say what is wrong, where, and the remedy. Broken invariants of our own code are `assert`s, not these.
"""


class KinetokError(Exception):
    """Base of all errors a user can act on; the command line prints them without a traceback."""


class ConfigError(KinetokError, ValueError):
    """A job file, an override or an option is wrong."""


class DataError(KinetokError, ValueError):
    """A source, clip index or shard cannot be used as asked."""


class ContractError(DataError):
    """Token shards and the tokenizer told to use them disagree."""


class StoreError(KinetokError, RuntimeError):
    """An artifact is missing, torn or changed."""


class LeaseLost(StoreError):
    """Another run took over the artifact that this run was building."""


class QuarantineLimit(KinetokError, RuntimeError):
    """More bad samples than the stage allows."""


class TrainingError(KinetokError, RuntimeError):
    """Training cannot start, continue or be trusted."""


class ClusterError(KinetokError, RuntimeError):
    """A Ray cluster cannot be reached, or does not take or know a job."""


class Cancelled(KinetokError, RuntimeError):
    """The run was asked to stop."""
