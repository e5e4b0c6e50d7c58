"""`Stage`: one typed, versioned unit of work of a job, and what it is handed when it runs.

A stage's literal fields are its identity; fields of type `Ref` name other stages of the job. Everything that says where or how
fast (store, workers, GPUs, batch size of the forward pass) is in `Resources` or the job and never enters the key, by construction.
Not covered: planning and running (`job.py`), files (`artifact.py`).
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeAlias, get_args

from pydantic import Field, StrictInt, model_validator
from pydantic_core import core_schema

from kinetok.infra.artifact import Artifact, Counts
from kinetok.infra.config import Config
from kinetok.infra.errors import Cancelled
from kinetok.infra.fingerprint import Plain, fingerprint, plain
from kinetok.infra.storage import Folder


class Ref(str):
    """The name of another stage of the same job. `Annotated[Ref, Produces("clips")]` says which kinds will do."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls, core_schema.str_schema(min_length=1), serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


@dataclass(frozen=True)
class Produces:
    """Marks a `Ref` field with the stage kinds it may name."""

    kinds: tuple[str, ...]

    def __init__(self, *kinds: str) -> None:
        object.__setattr__(self, "kinds", kinds)


Amount: TypeAlias = Annotated[float, Field(gt=0)]
ACCELERATOR = "accelerator_type:"
"""What Ray's resource that marks a node by its accelerator begins with."""
_BUILT_IN = ("CPU", "GPU", "memory", "object_store_memory")


class Resources(Config):
    """Where and how fast a stage runs; never part of its key."""

    workers: Annotated[StrictInt, Field(ge=1)] = 1
    """Training workers, or model actors of `encode` and `text`."""
    max_workers: Annotated[StrictInt, Field(ge=1)] | None = None
    """As many workers where the cluster has room, and never fewer than `workers`; None: `workers`."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs of one worker; also its intra-op threads. What counts none, and no GPU, runs beside the rest of a machine of ours and takes what
    that leaves."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one worker."""
    memory: Annotated[float, Field(ge=0)] = 0.0
    """Bytes of its node's memory that Ray sets aside for one worker."""
    accelerator: str | None = None
    """Accelerator that a worker's node must have, as Ray names it: `A100`, `H100`, `L4`."""
    custom: dict[str, Amount] = Field(default_factory=dict)
    """Custom resources of one worker: `{trainer: 1}` keeps workers on the nodes that Ray was started on with `trainer`."""
    decoders: Annotated[StrictInt, Field(ge=1)] | None = None
    """Decode tasks at a time; None: one for each CPU that is left."""
    decoder_custom: dict[str, Amount] = Field(default_factory=dict)
    """Custom resources of one decode task."""
    decode_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that one video may keep a decoder; it is quarantined then. Far more than `Limits.work` takes on a slow core."""
    loaders: Annotated[StrictInt, Field(ge=0)] = 0
    """Loader processes of one training worker; 0 loads in the worker itself."""
    batch_size: Annotated[StrictInt, Field(ge=1)] = 4
    """Clips of one forward pass when encoding or evaluating; micro-batch of one training worker."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass when encoding and evaluating."""
    tile: Annotated[StrictInt, Field(ge=1)] | None = None
    """Cells along an edge that a convolution yields at a time when encoding, evaluating and generating, for large frames on a GPU; None:
    all. The result is the same to rounding."""
    zero: Annotated[StrictInt, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage of training."""
    recompute: bool = False
    """Whether training a language model computes activations again on the way back instead of keeping them: less memory, same numbers."""
    compile: bool = False
    """Whether the heavy parts of the models that a stage runs go through torch.compile: minutes at the start, faster from then on, the same
    numbers to rounding. Every worker needs a C++ compiler."""
    max_failures: Annotated[StrictInt, Field(ge=0)] = 2
    """Restarts that a training run survives: workers that were lost, or could not reach the store."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(f"max_workers {self.max_workers} is less than workers {self.workers}")
        if self.compile and self.tile is not None:
            raise ValueError(
                "compile: a compiled graph holds every tile by itself and takes the longer to make the more there are; leave tile out"
            )
        if self.compile and self.zero == 3:
            raise ValueError(
                "compile: under ZeRO 3 weights come and go between layers, which breaks the graph at each of them; set zero: 2"
            )
        for name in (*self.custom, *self.decoder_custom):
            if name in _BUILT_IN or ":" in name:
                raise ValueError(f"custom resource {name!r}: Ray itself counts that one; say cpus, gpus, memory or accelerator")
        return self

    @property
    def worker(self) -> dict[str, float]:
        """What one worker asks of its node, by Ray's names."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory, **self.custom}
        kind = {f"{ACCELERATOR}{self.accelerator}": 0.001} if self.accelerator else {}
        return {name: amount for name, amount in asked.items() if amount} | kind

    @property
    def decoder(self) -> dict[str, float]:
        """What one decode task asks of its node, by Ray's names."""
        return {"CPU": 1.0, **self.decoder_custom}


@dataclass(frozen=True)
class Ask:
    """Processes that a stage needs a Ray cluster to hold."""

    what: str
    """One of them, as a user calls it."""
    each: Mapping[str, float]
    """What one asks of its node, by Ray's names."""
    together: int = 1
    """How many must run at once for the stage to run at all."""
    beside: bool = False
    """Whether it feeds the workers and takes CPUs of its own: with none left for it, they would wait for ever."""


class Progress(Protocol):
    """What a stage reports while it runs; each call raises Cancelled once the run was asked to stop."""

    def __call__(
        self,
        *,
        done: int | None = None,
        total: int | None = None,
        unit: str | None = None,
        quarantined: int | None = None,
        note: str | None = None,
    ) -> None: ...


@dataclass
class StageResult:
    """What a stage says of its finished output."""

    metrics: dict[str, float] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)


@dataclass
class StageContext:
    """What `Stage.run` is handed.

    `inputs` maps each Ref field to the finished artifact it names (a tuple where the field is a tuple of Refs; an unset optional
    field is absent). `out` is this stage's own folder: it may hold finished parts of an earlier, killed attempt.
    """

    name: str
    key: str
    inputs: Mapping[str, Artifact | tuple[Artifact, ...]]
    out: Folder
    resources: Resources
    progress: Progress
    stop: threading.Event
    """Set when the run must end: cancelled, or the lease on `out` was lost."""

    def input(self, field_name: str) -> Artifact:
        """The artifact of a single Ref field."""
        found = self.inputs[field_name]
        assert isinstance(found, Artifact), f"{field_name} holds several artifacts"
        return found

    def optional(self, field_name: str) -> Artifact | None:
        """The artifact of an optional Ref field, None where it is unset."""
        return self.input(field_name) if field_name in self.inputs else None

    def several(self, field_name: str) -> tuple[Artifact, ...]:
        """The artifacts of a tuple-of-Refs field."""
        found = self.inputs.get(field_name, ())
        assert isinstance(found, tuple), f"{field_name} holds one artifact"
        return found

    def check(self) -> None:
        """Raise Cancelled if the run must end; call it in long loops."""
        if self.stop.is_set():
            raise Cancelled(f"stage {self.name} was asked to stop")


class Stage(Config):
    """Base of all stages. A subclass sets `kind: Literal[...]`, `version` and `run`, and is listed in `pipelines/catalog.py`."""

    kind: str
    version: ClassVar[int] = 1
    """Bump it in the commit that changes what the stage's output means; the source text is never part of the key."""
    uses_ray: ClassVar[bool] = False
    """Whether `run` needs Ray: the engine then starts or joins a cluster before it, unless the stage is cached."""
    compiles: ClassVar[bool] = False
    """Whether it runs models with parts that are worth compiling (`resources.compile`)."""
    rates: ClassVar[Mapping[str, str]] = {}
    """Names in the metrics of a record of what one process of each sort, as `asks` calls it, does of the input in a second."""
    scales_with: ClassVar[tuple[str, ...]] = ()
    """Numeric literal fields whose product the stage's time and output grow with; empty: they grow with the samples of its inputs."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Fields that say where `facts` are read."""

    def run(self, ctx: StageContext) -> StageResult:
        """Fill `ctx.out`; called again after a kill with whatever was finished still there."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Bring to this machine what `facts` reads and is not here; called before a run is planned, never by a plan alone."""

    def facts(self) -> Mapping[str, Plain]:
        """Facts outside the fields that belong to the identity (a source's listing digest); read at plan time, no side effects.

        Raises DataError or StoreError where what they are read from is not at hand.
        """
        return {}

    def problems(self, resources: Resources, stages: "Mapping[str, Stage]") -> Iterator[str]:
        """What is wrong between the fields, the resources and the other stages, as `field: sentence`.

        Called when a job is read, once every reference leads to a stage of a fitting kind; reads no files.
        """
        yield from ()

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        """What the stage needs a Ray cluster to hold; a job whose cluster never will is refused before it starts."""
        return ()

    def refs(self) -> Iterator[tuple[str, Ref]]:
        """(field, stage name) of every reference, tuples flattened in order."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Ref):
                yield name, value
            elif isinstance(value, tuple):
                yield from ((name, item) for item in value if isinstance(item, Ref))

    @classmethod
    def ref_fields(cls) -> dict[str, Produces | None]:
        """The fields that name other stages, set or not, with the kinds each accepts (None: any)."""
        found = {name: [info.annotation, *info.metadata] for name, info in cls.model_fields.items()}
        parts = {name: [part for given in annotation for part in _parts(given)] for name, annotation in found.items()}
        return {name: next((p for p in all_ if isinstance(p, Produces)), None) for name, all_ in parts.items() if Ref in all_}

    def literals(self) -> dict[str, Plain]:
        """The fields that are not references, as canonical JSON data, without `kind`."""
        dumped = self.model_dump(mode="json", exclude={"kind", *self.ref_fields()})
        return {name: plain(value) for name, value in dumped.items()}

    def identity(self, input_keys: Mapping[str, str | list[str]]) -> dict[str, Plain]:
        """Everything the key is made of."""
        return {
            "kind": self.kind,
            "version": self.version,
            "config": self.literals(),
            "facts": plain(dict(self.facts())),
            "inputs": plain(dict(input_keys)),
        }

    def key(self, input_keys: Mapping[str, str | list[str]]) -> str:
        """16 hex digits naming this stage's output, known before anything runs."""
        return fingerprint(self.identity(input_keys))


def _parts(annotation: object) -> Iterator[object]:
    """An annotation and everything inside its brackets."""
    yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)
