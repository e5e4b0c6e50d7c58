"""`diffusion`: fit a video diffusion transformer on cached latents and cached text embeddings.

The latents are normalised by the statistics that their shards carry, and the statistics are saved with the model. `generator.json` says
which tokenizer and which text encoder it belongs to. Not covered: the loop (`kinetok.infra.training`), the model and what it learns
(`kinetok.llm`), sampling (`generate.py`).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kinetok.infra.errors import ContractError
from kinetok.infra.fit import FitConfig, fit, fit_problems
from kinetok.infra.stage import Ask, Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.llm.dit import DiTConfig
from kinetok.llm.text import UNTRAINED, UNTRAINED_WIDTH
from kinetok.llm.training import DiffusionObjective
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.encode import Encode
from kinetok.pipelines.stages.text import Text
from kinetok.pipelines.stages.train import Train
from kinetok.tokenizers.base import latent_steps
from kinetok.tokenizers.causal.autoencoder import CausalConfig
from kinetok.tokenizers.causal.grown import GrownConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kinetok.infra.training import Trainable
    from kinetok.pipelines.data.latent_feed import GeneratorSpec


class Diffusion(Stage, FitConfig):
    """A trained diffusion transformer in `model/`, `generator.json`, its metrics in `metrics/`, and `training.json`."""

    kind: Literal["diffusion"] = "diffusion"
    version: ClassVar[int] = 1
    compiles: ClassVar[bool] = True
    uses_ray: ClassVar[bool] = True
    scales_with: ClassVar[tuple[str, ...]] = ("steps", "global_batch")
    latents: Annotated[Ref, Produces("encode")]
    """Tokens to learn; the clips of their `val` split are what is evaluated, nothing is where it is empty."""
    text: Annotated[Ref, Produces("text")]
    """Embeddings of the captions of the same clips."""
    model: DiTConfig
    objective: DiffusionObjective = Field(default_factory=DiffusionObjective)

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """What would otherwise end the training when it starts, hours after the job did."""
        yield from fit_problems(self, resources, self.objective.players)
        latents, text = stages[self.latents], stages[self.text]
        assert isinstance(latents, Encode) and isinstance(text, Text)
        if latents.content != "tokens":
            yield f"latents: {self.latents} holds {latents.content}; name an encoding with content: tokens"
        if latents.data != text.data:
            yield f"text: {self.text} is of {text.data}, the latents are of {latents.data}; let both name the same clips"
        known = _latents(latents, stages)
        if text.text.encoder == UNTRAINED:
            known["text_width"] = UNTRAINED_WIDTH
        for name, value in known.items():
            if value != getattr(self.model, name):
                yield f"model.{name}: is {getattr(self.model, name)}; the latents and the text it learns from make it {value}"

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        return (Ask("training worker", resources.worker, resources.workers),)

    def run(self, ctx: StageContext) -> StageResult:
        """Train, or continue where an earlier attempt was killed."""
        from kinetok.llm.card import belongs
        from kinetok.pipelines.data.latent_feed import GENERATOR_FILE, LatentFeed, splits
        from kinetok.pipelines.data.token_shards import latent_statistics
        from kinetok.pipelines.trained_card import complete_card

        latents = ctx.input("latents")
        feed = partial(LatentFeed, latents, ctx.input("text"), seed=self.seed, loaders=ctx.resources.loaders)
        train = feed(split="train")
        require_fit(self.model, train.spec)
        ctx.out.write_text(GENERATOR_FILE, train.spec.model_dump_json(indent=1))
        numbers = FitConfig.model_validate(self.model_dump(include=set(FitConfig.model_fields)))
        metrics = fit(
            partial(build_trainable, self.model, self.objective, latent_statistics(latents)),
            train,
            feed(split="val") if "val" in splits(latents) else None,
            numbers,
            out=ctx.out,
            resources=ctx.resources,
            progress=ctx.progress,
            stop=ctx.stop,
        )
        text = train.spec.text
        complete_card(ctx, numbers, train.spec.recipe, metrics, belongs(train.spec.latents, (text.text, text.weights)))
        return StageResult(metrics)


def _latents(encode: Encode, stages: Mapping[str, Stage]) -> dict[str, int]:
    """`z` and `chunk` of the latents as far as the job tells; nothing is known of a tokenizer trained elsewhere."""
    model, clips, z, temporal = stages[encode.model], stages[encode.data], 1, 1
    while isinstance(model, Train) and isinstance(model.model, GrownConfig) and model.lower is not None:
        z *= 2 if model.model.mix == "dual" else 1
        temporal *= 2
        model = stages[model.lower]
    if not (isinstance(model, Train) and isinstance(model.model, CausalConfig) and isinstance(clips, Clips)):
        return {}
    frames = encode.chunks.frames if encode.chunks else clips.frames
    return {"z": z * model.model.z, "chunk": latent_steps(frames, temporal * model.model.temporal)}


def require_fit(model: DiTConfig, spec: "GeneratorSpec") -> None:
    """Raise ContractError, with every number that is off, where a model of these numbers cannot take the latents or the text."""
    found = {"z": spec.shape[0], "text_width": spec.text.width, "chunk": spec.chunk}
    wrong = [f"{name} is {getattr(model, name)}, the data have {value}" for name, value in found.items() if value != getattr(model, name)]
    if not wrong:
        try:
            model.grid(spec.shape[1:])
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ContractError(f"the model does not fit its data: {'; '.join(wrong)}; change `model` of the stage")


def build_trainable(model: DiTConfig, objective: DiffusionObjective, statistics: "tuple[Tensor, Tensor]") -> "Trainable":
    """A fresh model on latents of these statistics, as the training loop takes it; called in every worker."""
    from kinetok.llm.dit import VideoDiT
    from kinetok.llm.training import DiTTrainable

    return DiTTrainable(VideoDiT(model).set_statistics(*statistics), objective)
