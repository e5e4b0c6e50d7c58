"""`train`: fit a tokenizer on clips, a base model alone or a grown one on the frozen model that `lower` names.

`features` are the lower model's trunk features, cached by `encode`; without them they are computed on the fly, for the same losses.
Not covered: the loop (`kinetok.infra.training`), what the clips look like (`data/feed.py`), what a model learns from them (`tokenizers`).
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import ConfigError, ContractError
from kinetok.infra.fit import SUMMARY, FitConfig, fit, fit_problems
from kinetok.infra.stage import Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.infra.storage import Folder
from kinetok.pipelines.stages.clips import Clips
from kinetok.tokenizers.catalog import ObjectiveConfig, TokenizerConfig
from kinetok.tokenizers.causal.grown import GrownConfig

if TYPE_CHECKING:
    from kinetok.infra.training import Trainable
    from kinetok.tokenizers.base import Tokenizer

_FEATURES_ALONE = "they are of a lower model: name it as lower, or leave features out"


class Train(Stage, FitConfig):
    """A trained tokenizer in `model/`, its metrics in `metrics/`, and `training.json`."""

    kind: Literal["train"] = "train"
    version: ClassVar[int] = 1
    uses_ray: ClassVar[bool] = True
    scales_with: ClassVar[tuple[str, ...]] = ("steps", "global_batch")
    data: Annotated[Ref, Produces("clips")]
    """The clips to train on; their `val` split is what is evaluated; nothing is where it is empty."""
    features: Annotated[Ref, Produces("encode")] | None = None
    """Trunk features of the lower model; None computes them in every step."""
    lower: Annotated[Ref, Produces("train", "model")] | None = None
    """The frozen model that a grown one stands on."""
    model: TokenizerConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """What would otherwise end the training when it starts, hours after the job did."""
        yield from fit_problems(self, resources, self.objective.players)
        yield from (f"objective.{problem}" for problem in self.objective.problems(self.steps))
        if resources.zero == 3 and self.objective.adversarial is not None:
            yield "objective.adversarial: its weight is found by a backward pass of its own, which ZeRO 3 does not survive; set zero: 2"
        if self.model.grows and self.lower is None:
            yield f"lower: is missing; a {self.model.kind} model stands on the frozen model that it names"
        if not self.model.grows and self.lower is not None:
            yield f"lower: a {self.model.kind} model stands on its own; leave lower out"
        if self.features is not None and self.lower is None:
            yield f"features: {_FEATURES_ALONE}"
        elif self.features is not None and not isinstance(self.model, GrownConfig):
            yield f"features: a {self.model.kind} model is not trained from features; leave them out"
        yield from misfits(self.data, self, stages)

    def run(self, ctx: StageContext) -> StageResult:
        """Train, or continue where an earlier attempt was killed."""
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.data.feed import ClipFeed

        notes = self._notes()
        ctx.progress(note="; ".join(notes))
        lower, features = ctx.optional("lower"), ctx.optional("features")
        if features is not None:
            _require_contract(features, lower, ctx.input("data"))
        feed = partial(ClipFeed, ctx.input("data"), seed=self.seed, features=features, loaders=ctx.resources.loaders)
        metrics = fit(
            partial(build_trainable, self.model, self.objective, lower),
            feed(split="train"),
            feed(split="val") if "val" in ClipIndex.open(ctx.input("data")).splits else None,
            FitConfig.model_validate(self.model_dump(include=set(FitConfig.model_fields))),
            out=ctx.out,
            resources=ctx.resources,
            progress=ctx.progress,
            stop=ctx.stop,
        )
        _complete(ctx.out, notes, metrics)
        return StageResult(metrics)

    def _notes(self) -> tuple[str, ...]:
        """What the run must say of its loss. Raises ConfigError, before workers start, where weights that it names cannot be had."""
        try:
            return self.objective.notes()
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from error


def _complete(out: Folder, notes: tuple[str, ...], metrics: Mapping[str, float]) -> None:
    """Add what only the driver knows: the notes to `training.json`, the validation figures to the model card."""
    from kinetok.tokenizers.card import CARD_FILE, figures

    out.write_text(SUMMARY, json.dumps(json.loads(out.read_text(SUMMARY)) | {"notes": notes}, indent=1))
    card = f"model/{CARD_FILE}"
    out.write_text(card, out.read_text(card) + figures(metrics))


def misfits(data: Ref, model: Stage, stages: Mapping[str, Stage]) -> Iterator[str]:
    """A sentence where the clips `data` are no multiple of what `model` needs; nothing is known of a model trained elsewhere."""
    while isinstance(model, Train) and model.lower is not None:
        model = stages[model.lower]
    clips, spatial = stages[data], model.model.spatial if isinstance(model, Train) else None
    if spatial is not None and isinstance(clips, Clips) and (clips.height % spatial or clips.width % spatial):
        yield f"data: {data} has clips of {clips.height} x {clips.width} pixels; the model needs multiples of {spatial}"


def build_trainable(model: TokenizerConfig, objective: ObjectiveConfig, lower: Artifact | None) -> "Trainable":
    """A fresh model on the saved lower one, as the training loop takes it; called in every worker."""
    from kinetok.tokenizers import catalog

    return catalog.trainable(catalog.build(model, _open(lower)), objective)


def _open(lower: Artifact | None) -> "Tokenizer | None":
    from kinetok.pipelines.models import growable, model_folder, open_model

    return None if lower is None else growable(open_model(model_folder(lower)))


def _require_contract(features: Artifact, lower: Artifact | None, clips: Artifact) -> None:
    """Refuse features that another model wrote, or of other clips: ids may be the same where the pixels are not (contract 3)."""
    from kinetok.pipelines.data.token_shards import TokenShards, require_spec

    model = _open(lower)
    if model is None:
        raise ConfigError(f"features: {_FEATURES_ALONE}")
    require_spec(TokenShards.open(features).spec, model.spec())
    if [info.digest for info in features.record.inputs.get("data", ())] != [clips.digest]:
        raise ContractError(
            f"{features.name} was not made of {clips.name}-{clips.key} as it is now: encode these clips, or leave features out"
        )
