"""`generate`: videos of prompts out of a trained diffusion transformer, decoded by the tokenizer that its latents came from.

Output: `videos/{number:03d}.mp4`, `contact.png` (a row of frames of each) and `prompts.json`. Videos longer than a chunk are several
chunks of latents, sampled together and blended where they share frames. All noise comes from `seed` and the number of the prompt, so a
run again makes the same videos. Runs in the driver's process, on its GPU where `resources.gpus` asks for one. Not covered: sampling
itself (`kinetok.llm.flow`), how good the videos are.

Legend: B videos, Z latent channels, t h w latent positions, T H W frames, rows, columns.
"""

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictInt, StringConstraints

from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.stage import Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.report.tables import CONTACT, GENERATION, Generated, Generation
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.diffusion import Diffusion
from kinetok.pipelines.stages.encode import Encode
from kinetok.tokenizers.causal.chunks import ChunkPlan

if TYPE_CHECKING:
    from torch import Tensor

    from kinetok.llm.dit import VideoDiT
    from kinetok.llm.text import TextEncoder
    from kinetok.pipelines.data.latent_feed import GeneratorSpec
    from kinetok.pipelines.data.text_shards import TextShards
    from kinetok.tokenizers.base import Tokenizer

Prompt = Annotated[str, StringConstraints(min_length=1)]
Prompts = Annotated[tuple[Prompt, ...], Field(min_length=1)]


class Generate(Stage):
    """Videos of prompts."""

    kind: Literal["generate"] = "generate"
    version: ClassVar[int] = 1
    compiles: ClassVar[bool] = True
    scales_with: ClassVar[tuple[str, ...]] = ("steps", "frames")
    model: Annotated[Ref, Produces("diffusion")]
    """The generator; its averaged weights where it was trained with `ema`."""
    tokenizer: Annotated[Ref, Produces("train", "model")]
    """The tokenizer whose latents it learned."""
    text: Annotated[Ref, Produces("text")]
    """The embeddings it learned from; prompts go through the same encoder."""
    prompts: Prompts | Annotated[StrictInt, Field(ge=1)] = 4
    """What to show, or how many captions of the `val` split to take."""
    frames: Annotated[StrictInt, Field(ge=1)] = 17
    """Frames of each video."""
    steps: Annotated[StrictInt, Field(ge=1)] = 30
    """Euler steps."""
    guidance: Annotated[float, Field(ge=0)] = 4.0
    """Strength of classifier-free guidance; 1 is none."""
    # Not dumped where it is not set: it would give every stage that does without another key.
    beyond: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether `frames` may be more chunks than the clips had: the generator never saw the numbers of the later ones."""
    seed: StrictInt = 0

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """A tokenizer or a text encoder that is not the one the model learned with, and more chunks than it ever saw."""
        model = stages[self.model]
        assert isinstance(model, Diffusion)
        latents = stages[model.latents]
        assert isinstance(latents, Encode)
        if latents.model != self.tokenizer:
            yield f"tokenizer: is {self.tokenizer}; {self.model} learned the latents of {latents.model}"
        if model.text != self.text:
            yield f"text: is {self.text}; {self.model} learned from {model.text}"
        clips = stages[latents.data]
        if isinstance(clips, Clips) and not self.beyond:
            plan = latents.chunks or ChunkPlan(frames=clips.frames)
            asked, learned = len(plan.spans(self.frames)), len(plan.spans(clips.frames))
            if asked > learned:
                yield (
                    f"frames: {self.frames} are {asked} chunks of {plan.frames}; {self.model} learned from clips of {learned}, "
                    f"{clips.frames} frames: ask for that many at most, let {latents.data} cut longer clips, or set beyond: true to try"
                )

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.data.latent_feed import GENERATOR_FILE, GeneratorSpec
        from kinetok.pipelines.data.text_shards import TextShards, open_encoder, require_encoder
        from kinetok.pipelines.data.token_shards import require_spec
        from kinetok.pipelines.models import model_folder, open_generator, open_model
        from kinetok.pipelines.stages.evaluate import threads

        spec = GeneratorSpec.model_validate_json(ctx.input("model").folder.read_bytes(GENERATOR_FILE))
        text, tokenizer = TextShards.open(ctx.input("text")), open_model(model_folder(ctx.input("tokenizer")))
        require_spec(spec.latents, tokenizer.spec())
        if text.spec != spec.text:
            raise ContractError(f"{ctx.input('model').name} learned from text of {spec.text}, {ctx.input('text').name} is of {text.spec}")
        encoder = open_encoder(spec.text.text)
        require_encoder(spec.text, encoder)
        prompts = self._prompts(text)
        sampler = Sampler(self, spec, open_generator(ctx.input("model")), tokenizer, encoder, ctx.resources)
        with threads(ctx.resources):
            return self._write(ctx, sampler, prompts)

    def _prompts(self, text: "TextShards") -> list[str]:
        if not isinstance(self.prompts, int):
            return list(self.prompts)
        found = [caption for _, caption in zip(range(self.prompts), text.captions("val"), strict=False)]
        if not found:
            raise DataError("prompts: the val split has no captions to take; write some prompts")
        return found

    def _write(self, ctx: StageContext, sampler: "Sampler", prompts: list[str]) -> StageResult:
        """The videos, in batches of `resources.batch_size`, then the contact sheet and the listing."""
        from kinetok.pipelines.data.order import sample_seed
        from kinetok.pipelines.report.panel import contact_sheet, enlarged, mp4, pixels, png

        fps, size = sampler.spec.recipe.fps, ctx.resources.batch_size
        seeds = [sample_seed(self.seed, number) for number in range(len(prompts))]
        shown, listed = [], []
        for first in range(0, len(prompts), size):
            chosen = slice(first, first + size)
            ctx.progress(done=first, total=len(prompts), unit="videos")
            videos = sampler(prompts[chosen], seeds[chosen])
            for number, (prompt, seed, video_CTHW) in enumerate(zip(prompts[chosen], seeds[chosen], videos, strict=True), start=first):
                frames_THWC, file = pixels(video_CTHW), f"videos/{number:03d}.mp4"
                ctx.out.write_bytes(file, mp4(enlarged(frames_THWC).numpy(), fps))
                shown.append(frames_THWC)
                listed.append(Generated(prompt=prompt, file=file, seed=seed))
        ctx.progress(done=len(prompts), total=len(prompts), unit="videos")
        ctx.out.write_bytes(CONTACT, png(contact_sheet(shown)))
        about = Generation(
            tokenizer=ctx.input("tokenizer").name,
            encoder=sampler.spec.text.text.encoder,
            frames=self.frames,
            fps=fps,
            steps=self.steps,
            guidance=self.guidance,
            tokens=sampler.tokens,
            videos=tuple(listed),
        )
        ctx.out.write_text(GENERATION, about.model_dump_json(indent=1))
        return StageResult({"videos": float(len(prompts)), "tokens": float(sampler.tokens), **sampler.seconds})


class Sampler:
    """Prompts to videos in [-1, 1], with what was loaded for it."""

    def __init__(
        self, stage: Generate, spec: "GeneratorSpec", model: "VideoDiT", tokenizer: "Tokenizer", text: "TextEncoder", resources: Resources
    ) -> None:
        import torch

        from kinetok.infra.compiling import compile_parts
        from kinetok.pipelines.data.token_shards import DTYPES
        from kinetok.tokenizers.base import standing

        device = torch.device("cuda" if resources.gpus else "cpu")
        arithmetic = DTYPES[resources.dtype]
        self.stage, self.spec = stage, spec
        self.precision = torch.autocast(device.type, arithmetic, enabled=arithmetic is not torch.float32)
        self.model, self.tokenizer, self.text = model.to(device), tokenizer.to(device), text.to(device)
        if resources.compile:
            compile_parts([self.model, *standing(self.tokenizer)])
        self.tile = resources.tile
        self.chunks = len(spec.plan.spans(stage.frames))
        self.seconds = {"sample_seconds": 0.0, "decode_seconds": 0.0}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the latent of one video, (Z, t, h, w)."""
        channels, _, rows, columns = self.spec.shape
        return channels, self.chunks * self.spec.chunk, rows, columns

    @property
    def tokens(self) -> int:
        """Tokens of one video."""
        steps, rows, columns = self.model.config.grid(self.shape[1:])
        return steps * rows * columns

    def __call__(self, prompts: list[str], seeds: list[int]) -> "Tensor":
        """Videos (B, 3, T, H, W), on the CPU."""
        import torch

        from kinetok.llm.flow import euler_sample
        from kinetok.tokenizers.base import Tokens
        from kinetok.tokenizers.causal.chunks import decode_chunks
        from kinetok.tokenizers.causal.tiling import tiled

        began, options = time.perf_counter(), self.stage
        text_BLE, mask_BL = self.text.encode(prompts)
        with torch.no_grad(), self.precision:
            sampled_BZthw = euler_sample(
                self.model, self.shape, text_BLE, mask_BL, steps=options.steps, guidance=options.guidance, seeds=seeds
            )
            latents = torch.split(self.model.denormalise(sampled_BZthw), self.spec.chunk, dim=2)
            if sampled_BZthw.is_cuda:
                torch.cuda.synchronize()
            sampled = time.perf_counter()
            parts = [Tokens(latent_BZthw, self.spec.plan.frames) for latent_BZthw in latents]
            with tiled(self.tile):
                video_BCTHW = decode_chunks(self.tokenizer, parts, self.spec.plan)[:, :, : options.frames].float().cpu()
        self.seconds["sample_seconds"] += sampled - began
        self.seconds["decode_seconds"] += time.perf_counter() - sampled
        return video_BCTHW
