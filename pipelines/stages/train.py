"""`train`: fit a tokenizer on clips: a base model alone, one that stands on the frozen model that `lower` names, or one that goes on.

`features` and `latents` are what frozen models make of the clips, cached by `encode` and `vit`; without them they are computed on the
fly, for the same losses. `start` names a trained model that learns on, with what it stands on: that is how the stages of Divot follow one
another. Not covered: the loop (`kinetok.infra.training`), what the clips look like (`data/feed.py`), what a model learns from them
(`tokenizers`), what is Divot's own (`divot_training.py`).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import ConfigError
from kinetok.infra.fingerprint import Plain, plain
from kinetok.infra.fit import SUMMARY, FitConfig, fit, fit_problems
from kinetok.infra.stage import Ask, Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.stages.clips import Clips
from kinetok.tokenizers.base import ModelConfig
from kinetok.tokenizers.catalog import ObjectiveConfig, TokenizerConfig
from kinetok.tokenizers.causal.grown import GrownConfig
from kinetok.tokenizers.causal.training import ReconstructionObjective
from kinetok.tokenizers.divot.tokenizer import DivotConfig
from kinetok.tokenizers.divot.training import DivotObjective
from kinetok.tokenizers.divot.unet_training import UNetObjective

if TYPE_CHECKING:
    from kinetok.infra.training import Feed, Trainable
    from kinetok.pipelines.data.positions import Split
    from kinetok.tokenizers.base import Tokenizer

_FEATURES_ALONE = "they are of a lower model: name it as lower, or leave features out"


class Train(Stage, FitConfig):
    """A trained tokenizer in `model/`, its metrics in `metrics/`, and `training.json`."""

    kind: Literal["train"] = "train"
    version: ClassVar[int] = 1
    compiles: ClassVar[bool] = True
    uses_ray: ClassVar[bool] = True
    scales_with: ClassVar[tuple[str, ...]] = ("steps", "global_batch")
    data: Annotated[Ref, Produces("clips")]
    """The clips to train on; their `val` split is what is evaluated; nothing is where it is empty."""
    features: Annotated[Ref, Produces("encode", "vit")] | None = None
    """Trunk features of the lower model, or a divot's of its vision transformer; None computes them in every step."""
    latents: Annotated[Ref, Produces("encode")] | None = None
    """Of a divot alone: tokens of the frozen autoencoder below it; None computes them in every step."""
    tokens: Annotated[Ref, Produces("encode", "write")] | None = None
    """Of a divot that refines or adapts alone: tokens of the clips, encoded or drawn by a language model, in place of features."""
    text: Annotated[Ref, Produces("text")] | None = None
    """Of a divot's U-Net alone: embeddings of the captions of the same clips."""
    lower: Annotated[Ref, Produces("train", "model")] | None = None
    """The frozen model that a grown one, or a divot, stands on."""
    start: Annotated[Ref, Produces("train", "model")] | None = None
    """The trained model to go on from, with all that it stands on; None starts a new one."""
    model: TokenizerConfig | None = None
    """What a new model is; None with `start`."""
    objective: ObjectiveConfig = Field(default_factory=ReconstructionObjective)

    def fetch(self) -> None:
        """Download what only the hub has: weights of LPIPS, a divot's vision transformer."""
        from kinetok.pipelines.outside import fetch_lpips, fetch_model

        if self._lpips is not None:
            fetch_lpips(self._lpips)
        if self._vit is not None:
            fetch_model(self._vit)

    def facts(self) -> Mapping[str, Plain]:
        """Digests of weights of others that the job names. Raises DataError or StoreError where they are not here."""
        from kinetok.pipelines.outside import file_digest, lpips_digest, model_digests

        found: dict[str, Plain] = {}
        if self._lpips is not None:
            found["lpips"] = lpips_digest(self._lpips)
        if self._vit is not None:
            found["vit"] = plain(model_digests(self._vit))
        if isinstance(self.objective, UNetObjective) and self.objective.dynamicrafter is not None:
            found["dynamicrafter"] = file_digest(self.objective.dynamicrafter, "objective.dynamicrafter")
        return found

    @property
    def _vit(self) -> str | None:
        """The vision transformer below a new divot."""
        return self.model.vit.path if isinstance(self.model, DivotConfig) else None

    @property
    def _lpips(self) -> str | None:
        """What the objective names for its perceptual term."""
        named = self.objective.perceptual if isinstance(self.objective, ReconstructionObjective) else None
        return None if named is None else named.weights

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """What would otherwise end the training when it starts, hours after the job did."""
        from kinetok.pipelines.stages.divot_training import divot_problems

        yield from fit_problems(self, resources, self.objective.players)
        yield from (f"objective.{problem}" for problem in self.objective.problems(self.steps))
        yield from self._unmade()
        config = config_of(self, stages)
        divot = isinstance(self.objective, DivotObjective | UNetObjective)
        if config is not None and isinstance(config, DivotConfig) != divot:
            needed = DivotObjective() if isinstance(config, DivotConfig) else ReconstructionObjective()
            yield f"objective.kind: a {config.kind} model is trained by an objective of kind {needed.kind}"
        yield from divot_problems(self, stages) if divot else self._rung_problems(resources)
        yield from misfits(self.data, self, stages)

    def _unmade(self) -> Iterator[str]:
        """What is wrong with where the model comes from."""
        if (self.model is None) == (self.start is None):
            yield "model: a training is of a new model (`model`) or goes on from a trained one (`start`): name one of the two"
        elif self.model is None:
            if self.lower is not None:
                yield "lower: the model that start names brings its own along; leave lower out"
        elif self.model.grows and self.lower is None:
            yield f"lower: is missing; a {self.model.kind} model stands on the frozen model that it names"
        elif not self.model.grows and self.lower is not None:
            yield f"lower: a {self.model.kind} model stands on its own; leave lower out"

    def _rung_problems(self, resources: Resources) -> Iterator[str]:
        """What a rung of the ladder cannot be trained with."""
        if resources.zero == 3 and isinstance(self.objective, ReconstructionObjective) and self.objective.adversarial is not None:
            yield "objective.adversarial: its weight is found by a backward pass of its own, which ZeRO 3 does not survive; set zero: 2"
        if self.features is not None and self.lower is None:
            yield f"features: {_FEATURES_ALONE}"
        elif self.features is not None and self.model is not None and not isinstance(self.model, GrownConfig):
            yield f"features: a {self.model.kind} model is not trained from features; leave them out"
        for name in ("latents", "tokens", "text"):
            if getattr(self, name) is not None:
                yield f"{name}: a divot is trained from them, a rung is not; leave {name} out"

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        return (Ask("training worker", resources.worker, resources.workers),)

    def run(self, ctx: StageContext) -> StageResult:
        """Train, or continue where an earlier attempt was killed."""
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.trained_card import complete_card

        notes, clips = self._notes(), ClipIndex.open(ctx.input("data"))
        ctx.progress(note="; ".join(notes))
        build, feed = self._work(ctx)
        numbers = FitConfig.model_validate(self.model_dump(include=set(FitConfig.model_fields)))
        metrics = fit(
            build,
            feed("train"),
            feed("val") if "val" in clips.splits else None,
            numbers,
            out=ctx.out,
            resources=ctx.resources,
            progress=ctx.progress,
            stop=ctx.stop,
        )
        # What only the driver knows.
        ctx.out.write_text(SUMMARY, json.dumps(json.loads(ctx.out.read_text(SUMMARY)) | {"notes": notes}, indent=1))
        complete_card(ctx, numbers, clips.recipe, metrics)
        return StageResult(metrics)

    def _work(self, ctx: StageContext) -> "tuple[Callable[[], Trainable], Callable[[Split], Feed]]":
        """What builds the model in every worker, and its feeds by split. Raises ContractError where a cache is of something else."""
        from kinetok.pipelines.data.feed import ClipFeed
        from kinetok.pipelines.stages.divot_training import divot_work, require_same_clips

        source = Source(self.model, ctx.optional("lower"), ctx.optional("start"))
        if isinstance(self.objective, DivotObjective | UNetObjective):
            return divot_work(source, self.objective, ctx, self.seed)
        features = ctx.optional("features")
        if features is not None:
            _require_contract(features, source.lower)
            require_same_clips(features, ctx.input("data"))

        def feed(split: "Split") -> ClipFeed:
            return ClipFeed(ctx.input("data"), split, self.seed, features, ctx.resources.loaders)

        return partial(build_trainable, source, self.objective), feed

    def _notes(self) -> tuple[str, ...]:
        """What the run must say of its loss. Raises ConfigError, before workers start, where weights that it names cannot be had."""
        try:
            return self.objective.notes()
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from error


@dataclass(frozen=True)
class Source:
    """Where the model of a training comes from: a config on a saved lower model, or a saved model. Pickled to the workers."""

    model: TokenizerConfig | None
    lower: Artifact | None
    start: Artifact | None

    def open(self) -> "Tokenizer":
        """A copy of the model; ConfigError where it cannot stand on the lower one."""
        from kinetok.pipelines.models import growable, model_folder, open_model
        from kinetok.tokenizers import catalog

        if self.start is not None:
            return open_model(model_folder(self.start))
        assert self.model is not None, "a job with neither is refused"
        lower = None if self.lower is None else open_model(model_folder(self.lower))
        if lower is not None and isinstance(self.model, GrownConfig):
            lower = growable(lower)
        try:
            return catalog.build(self.model, lower)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model: {error}") from error


def build_trainable(source: Source, objective: ObjectiveConfig) -> "Trainable":
    """The model as the training loop takes it; called in every worker."""
    from kinetok.tokenizers import catalog

    return catalog.trainable(source.open(), objective)


def config_of(stage: Stage, stages: Mapping[str, Stage]) -> ModelConfig | None:
    """The config of the model that a stage makes; nothing is known of one trained elsewhere."""
    while isinstance(stage, Train) and stage.start is not None:
        stage = stages[stage.start]
    return stage.model if isinstance(stage, Train) else None


def misfits(data: Ref, model: Stage, stages: Mapping[str, Stage]) -> Iterator[str]:
    """A sentence where the clips `data` are no multiple of what `model` needs; nothing is known of a model trained elsewhere."""
    clips, config = stages[data], config_of(model, stages)
    while isinstance(config, GrownConfig) and isinstance(model, Train) and (below := model.start or model.lower):
        model = stages[below]
        config = config_of(model, stages)
    if config is None or config.spatial is None or not isinstance(clips, Clips):
        return
    if clips.height % config.spatial or clips.width % config.spatial:
        yield f"data: {data} has clips of {clips.height} x {clips.width} pixels; the model needs multiples of {config.spatial}"
    elif isinstance(config, DivotConfig) and {clips.height, clips.width} != {config.edge}:
        yield f"data: {data} has clips of {clips.height} x {clips.width} pixels; the model takes {config.edge} x {config.edge} alone"


def _require_contract(features: Artifact, lower: Artifact | None) -> None:
    """Refuse features that another model wrote (contract 3)."""
    from kinetok.pipelines.data.token_shards import TokenShards, require_spec
    from kinetok.pipelines.models import growable, model_folder, open_model

    if lower is None:
        raise ConfigError(f"features: {_FEATURES_ALONE}")
    require_spec(TokenShards.open(features).spec, growable(open_model(model_folder(lower))).spec())
