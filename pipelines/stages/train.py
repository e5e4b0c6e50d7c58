"""`train`: fit a tokenizer on clips, a base model alone or a grown one on the frozen model that `lower` names.

`features` are the lower model's trunk features, cached by `encode`; without them they are computed on the fly, for the same losses.
Not covered: the loop (`kinetok.infra.training`), what the clips look like (`data/feed.py`), what a model learns from them (`tokenizers`).
"""

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import ConfigError
from kinetok.infra.fit import FitConfig, fit
from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult
from kinetok.tokenizers.catalog import ObjectiveConfig, TokenizerConfig

if TYPE_CHECKING:
    from kinetok.infra.training import Trainable
    from kinetok.tokenizers.base import Tokenizer


class Train(Stage, FitConfig):
    """A trained tokenizer in `model/`, its metrics in `metrics/`, and `training.json`."""

    kind: Literal["train"] = "train"
    version: ClassVar[int] = 1
    uses_ray: ClassVar[bool] = True
    scales_with: ClassVar[tuple[str, ...]] = ("steps", "global_batch")
    data: Annotated[Ref, Produces("clips")]
    """The clips to train on; their `val` split is what is evaluated."""
    features: Annotated[Ref, Produces("encode")] | None = None
    """Trunk features of the lower model; None computes them in every step."""
    lower: Annotated[Ref, Produces("train", "model")] | None = None
    """The frozen model that a grown one stands on."""
    model: TokenizerConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)

    def run(self, ctx: StageContext) -> StageResult:
        """Train, or continue where an earlier attempt was killed."""
        from kinetok.pipelines.data.feed import ClipFeed

        lower, features = ctx.optional("lower"), ctx.optional("features")
        if features is not None:
            _require_contract(features, lower)
        feed = partial(ClipFeed, ctx.input("data"), seed=self.seed, features=features, loaders=ctx.resources.loaders)
        metrics = fit(
            partial(build_trainable, self.model, self.objective, lower),
            feed(split="train"),
            feed(split="val"),
            FitConfig.model_validate(self.model_dump(include=set(FitConfig.model_fields))),
            out=ctx.out,
            resources=ctx.resources,
            progress=ctx.progress,
            stop=ctx.stop,
        )
        return StageResult(metrics)


def build_trainable(model: TokenizerConfig, objective: ObjectiveConfig, lower: Artifact | None) -> "Trainable":
    """A fresh model on the saved lower one, as the training loop takes it; called in every worker."""
    from kinetok.tokenizers import catalog

    return catalog.trainable(catalog.build(model, _open(lower)), objective)


def _open(lower: Artifact | None) -> "Tokenizer | None":
    from kinetok.pipelines.models import model_folder, open_model

    return None if lower is None else open_model(model_folder(lower))


def _require_contract(features: Artifact, lower: Artifact | None) -> None:
    """Refuse features that another model wrote (contract 3)."""
    from kinetok.pipelines.data.token_shards import TokenShards, require_spec

    model = _open(lower)
    if model is None:
        raise ConfigError(f"features: {features.name} are of a lower model: name it as lower, or leave features out")
    require_spec(TokenShards.open(features).spec, model.spec())
