"""What the `train` stage does for a Divot tokenizer: which caches each of its stages takes, and that they are of these models and clips.

| stage | `start` | `lower` | features | tokens | latents |
|---|---|---|---|---|---|
| U-Net | | the autoencoder | `vit` | `text` instead | `encode` of the autoencoder |
| joint | of the U-Net, or none | the autoencoder, without start | `vit` | | the same |
| refine | of joint | | `vit`, or none with tokens | `encode` of joint | the same |
| adapt | of refine | | | `write` | the same |

The training of a new model begins with the statistics of some of its clips (`kinetok.tokenizers.divot.statistics`), measured by the driver.
Not covered: what is learnt (`kinetok.tokenizers.divot.training`, `unet_training`), batches (`data/divot_feed.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.stage import Stage, StageContext
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.vit import Vit
from kinetok.tokenizers.divot.tokenizer import DivotConfig
from kinetok.tokenizers.divot.training import ADAPT, JOINT, DivotObjective
from kinetok.tokenizers.divot.unet_training import UNetObjective

if TYPE_CHECKING:
    from kinetok.infra.training import Feed, Trainable
    from kinetok.pipelines.data.divot_feed import DivotCaches, DivotFeed
    from kinetok.pipelines.data.positions import Split
    from kinetok.pipelines.stages.train import Source, Train
    from kinetok.tokenizers.divot.statistics import Statistics
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

STATISTICS_CLIPS = 100
"""Clips that statistics are measured on."""


def divot_problems(stage: "Train", stages: Mapping[str, Stage]) -> Iterator[str]:
    """What of a training of a Divot tokenizer cannot be meant, as `field: sentence`."""
    from kinetok.pipelines.stages.train import config_of

    objective, config = stage.objective, config_of(stage, stages)
    if isinstance(objective, DivotObjective):
        yield from _of_stage(stage, objective.stage)
    elif stage.text is None:
        yield "text: is missing; the U-Net learns from captions and frames before it learns from tokens"
    clips, features = stages[stage.data], stages.get(stage.features or "")
    if not isinstance(config, DivotConfig):
        return
    if isinstance(clips, Clips) and clips.frames != config.frames:
        yield f"data: {stage.data} has clips of {clips.frames} frames; a window of the model has {config.frames}, and a clip is one window"
    if isinstance(features, Vit) and (features.vit, features.frames) != (config.vit, config.encoder.frames):
        yield f"features: {stage.features} is of another vision transformer, or of other frames, than model.vit and encoder.frames say"


def _of_stage(stage: "Train", name: str) -> Iterator[str]:
    """Inputs that a stage of the training has no use for, or lacks."""
    if stage.text is not None:
        yield f"text: {name} learns from tokens; captions are for an objective of kind divot_unet"
    if name == JOINT and stage.tokens is not None:
        yield "tokens: the joint stage learns to make them; name features, or leave both out"
    if name != JOINT and stage.start is None:
        yield f"start: is missing; {name} goes on from a model that was trained jointly"
    if stage.tokens is not None and stage.features is not None:
        yield "features: tokens take their place; leave features out"
    if name == ADAPT and stage.tokens is None:
        yield "tokens: are missing; adapt learns from those that a language model wrote"


def divot_work(
    source: "Source", objective: DivotObjective | UNetObjective, ctx: StageContext, seed: int
) -> "tuple[Callable[[], Trainable], Callable[[Split], Feed]]":
    """What builds the model in every worker, and its feeds by split. Raises ContractError where a cache is of something else."""
    from kinetok.pipelines.data.divot_feed import DivotCaches, DivotFeed

    model, clips = _divot(source), ctx.input("data")
    caches = DivotCaches(*(ctx.optional(name) for name in ("latents", "features", "tokens", "text")))
    _require_contract(caches, model, clips)

    def feed(split: "Split") -> DivotFeed:
        return DivotFeed(clips, split, seed, caches, ctx.resources.loaders, objective.stride)

    statistics = None
    if source.start is None:
        ctx.progress(note="measuring features and latents")
        statistics = measured(model, feed("train"), ctx.resources.batch_size)
    return partial(build_divot, source, objective, statistics), feed


def measured(model: "DivotTokenizer", feed: "DivotFeed", batch: int) -> "Statistics":
    """Statistics of the first clips in the order of training, `batch` at a time; DataError where they have none."""
    from kinetok.tokenizers.divot.statistics import measure

    count = min(STATISTICS_CLIPS, len(feed))
    try:
        return measure(model, (feed.load(list(range(first, min(first + batch, count)))) for first in range(0, count, batch)))
    except ValueError as error:
        raise DataError(f"the latents of {feed.clips.name} cannot be normalised: {error}") from error


def build_divot(source: "Source", objective: DivotObjective | UNetObjective, statistics: "Statistics | None") -> "Trainable":
    """The model with its statistics, as the training loop takes it; called in every worker."""
    from kinetok.tokenizers import catalog
    from kinetok.tokenizers.divot.statistics import give

    model = _divot(source)
    return catalog.trainable(model if statistics is None else give(model, statistics), objective)


def _divot(source: "Source") -> "DivotTokenizer":
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

    model = source.open()
    if not isinstance(model, DivotTokenizer):
        raise ContractError(f"start: a {model.config.kind!r} model cannot be trained as a divot")
    return model


def require_same_clips(cache: Artifact, clips: Artifact) -> None:
    """Refuse what was made of other clips: ids may be the same where the pixels are not (contract 3)."""
    if [info.digest for info in cache.record.inputs.get("data", ())] != [clips.digest]:
        raise ContractError(
            f"{cache.name} was not made of {clips.name}-{clips.key} as it is now: encode these clips, or leave {cache.name} out"
        )


def _require_contract(caches: "DivotCaches", model: "DivotTokenizer", clips: Artifact) -> None:
    """Refuse caches of other models or other clips (contract 3)."""
    from kinetok.pipelines.data.token_shards import TokenShards, require_spec
    from kinetok.tokenizers.divot.vit import ClipFeatures

    if caches.text is not None:
        _require_text(caches.text, model, clips)
    features = ClipFeatures(model.vit, model.config.encoder.frames)
    for cache, writer in ((caches.latents, model.lower), (caches.features, features), (caches.tokens, model)):
        if cache is not None:
            require_spec(TokenShards.open(cache).spec, writer.spec())
            require_same_clips(cache, clips)


def _require_text(text: Artifact, model: "DivotTokenizer", clips: Artifact) -> None:
    """Refuse captions of other clips, and embeddings that the U-Net cannot take beside an image."""
    from kinetok.pipelines.data.text_shards import TextShards

    require_same_clips(text, clips)
    spec, unet = TextShards.open(text).spec, model.config.detokenizer.unet
    if spec.width != unet.context or unet.split not in (None, spec.text.max_tokens):
        needed = f"{unet.split or 'any number of'} tokens of {unet.context} numbers"
        raise ContractError(
            f"{text.name} holds {spec.text.max_tokens} tokens of {spec.width} numbers; the context of the U-Net is {needed}"
        )
