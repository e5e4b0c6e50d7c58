"""Every family of models with its parts compiled: one graph each, the same numbers as without, the same names and digests."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from kinetok.infra import compiling
from kinetok.infra.compiling import compile_parts
from kinetok.infra.stage import Resources
from kinetok.infra.training import Trainable
from kinetok.llm.dit import DiTConfig, VideoDiT
from kinetok.llm.text import TextConfig, TextEncoder
from kinetok.llm.training import DiffusionObjective, DiTTrainable
from kinetok.pipelines.data.encoding import Encoder, Encoding
from kinetok.pipelines.report.carried import shown
from kinetok.pipelines.stages.generate import Sampler
from kinetok.pipelines.tokens_shown import Shower
from kinetok.tokenizers import catalog
from kinetok.tokenizers.base import Batch, DecodeRecipe, Tokenizer, Tokens, standing
from kinetok.tokenizers.causal.autoencoder import CausalConfig
from kinetok.tokenizers.causal.chunks import ChunkPlan
from kinetok.tokenizers.causal.grown import GrownConfig
from kinetok.tokenizers.causal.training import AdversarialConfig, ReconstructionObjective
from kinetok.tokenizers.divot.presets import SMALL
from kinetok.tokenizers.divot.training import DivotObjective
from kinetok.tokenizers.divot.vit import ClipFeatures

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile hides it by itself

CAUSAL = CausalConfig(channels=8, mult=(1, 1), strides=((2, 2),), blocks=1, z=4, groups=4)
GROWN = GrownConfig(blocks=1, groups=4)
UNET = SMALL.detokenizer.unet.model_copy(update={"z": 4, "channels": 16, "mult": (1,), "attention": (0,), "head_width": 8})
DIVOT = SMALL.model_copy(update={"edge": 16, "detokenizer": SMALL.detokenizer.model_copy(update={"unet": UNET})})
Result = TypeVar("Result")


def base() -> Tokenizer:
    return catalog.build(CAUSAL)


def image_path() -> Tokenizer:
    video = CAUSAL.model_copy(update={"image_path": "frozen2d"})
    return catalog.build(video, catalog.build(video.image))


def grown() -> Tokenizer:
    return catalog.build(GROWN, catalog.build(GROWN, base()))


def dual() -> Tokenizer:
    return catalog.build(GROWN.model_copy(update={"mix": "dual", "unfreeze_decoder": "all"}), base())


def divot() -> Tokenizer:
    return catalog.build(DIVOT, base())


def shaken(model: nn.Module) -> nn.Module:
    """With every weight moved: a start has zeros, behind which nothing would be compared."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in standing(model):
            for weight in each.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


def parts(*models: nn.Module) -> list[nn.Module]:
    return [part for model in models for part in model.modules() if getattr(part, compiling.MARK, False)]


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Compiles with autograd's graphs and no kernels, which is quick; what it yields fails where a graph was broken or made too often."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")

    def whole() -> None:
        found = torch._dynamo.utils.counters
        assert found["stats"]["unique_graphs"] > 0 and not found["graph_break"], dict(found["graph_break"])

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield whole
    torch._dynamo.reset()


def both(work: Callable[[], Result], models: list[nn.Module], whole: Callable[[], None]) -> tuple[Result, Result]:
    """What `work` gives with plain models, then with their parts compiled."""
    plain = work()
    compile_parts(models)
    fast = work()
    whole()
    return plain, fast


@pytest.mark.parametrize("build", [image_path, grown, pytest.param(divot, marks=pytest.mark.long)])
def test_tokenizing(build: Callable[[], Tokenizer], counters: Callable[[], None]) -> None:
    """At 16x the lowest trunk sees three rates of the video."""
    model = shaken(build()).eval()
    assert isinstance(model, Tokenizer)
    video_BCTHW = torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def work() -> list[Tensor]:
        with torch.inference_mode():
            return [(tokens := model.encode(video_BCTHW)).values, model.decode(Tokens(tokens.values, 9))]

    digest = model.digest()
    plain, fast = both(work, standing(model), counters)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    assert model.digest() == digest and parts(*standing(model))


def gradients(trainable: Trainable, batch: Batch, step: int = 1) -> list[Tensor]:
    found = []
    for player in trainable.players.values():
        loss, _ = player(batch, step)
        weights = [weight for weight in player.parameters() if weight.requires_grad]
        found += [loss.detach(), *(g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None)]
    return found


def trained(model: Tokenizer, objective: ReconstructionObjective | DivotObjective, batch: Batch, whole: Callable[[], None]) -> None:
    trainable = catalog.trainable(model, objective)
    for player in trainable.players.values():
        player.train()
    models = [*trainable.players.values(), *trainable.frozen.values()]
    plain, fast = both(lambda: [*gradients(trainable, batch, 1), *gradients(trainable, batch, 2)], models, whole)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


VIDEO: Batch = {
    "video_BTHWC": torch.randint(0, 256, (2, 9, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)),
    "seed_B": torch.arange(2),
}


@pytest.mark.parametrize("build", [base, dual])
def test_training_a_rung(build: Callable[[], Tokenizer], counters: Callable[[], None]) -> None:
    model = shaken(build())
    assert isinstance(model, Tokenizer)
    trained(model, ReconstructionObjective(), VIDEO, counters)


def test_training_against_a_discriminator(counters: Callable[[], None]) -> None:
    """From its start on, its weight is found by walking the decoder's graph twice before the backward pass does."""
    model = shaken(base())
    assert isinstance(model, Tokenizer)
    trained(model, ReconstructionObjective(adversarial=AdversarialConfig(start=2, width=8, layers=2)), VIDEO, counters)


@pytest.mark.long
def test_training_divot(counters: Callable[[], None]) -> None:
    """With activations of the U-Net computed anew on the way back."""
    model = shaken(divot())
    assert isinstance(model, Tokenizer)
    shape = (2, DIVOT.frames, DIVOT.edge, DIVOT.edge, 3)
    video_BTHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    trained(model, DivotObjective(recompute=True), {"video_BTHWC": video_BTHWC, "seed_B": torch.arange(2)}, counters)


def test_the_vision_transformer(counters: Callable[[], None]) -> None:
    model = divot()
    features = ClipFeatures(model.vit, 2)
    video_BCTHW = torch.rand(2, 3, DIVOT.frames, DIVOT.edge, DIVOT.edge) * 2 - 1
    plain, fast = both(lambda: features.encode(video_BCTHW).values, [features], counters)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_training_a_generator(counters: Callable[[], None]) -> None:
    """Its blocks are of one class and shape: one graph serves all of them."""
    model = shaken(VideoDiT(DiTConfig(z=4, width=48, depth=3, heads=2, text_width=8, chunk=2)))
    assert isinstance(model, VideoDiT)
    generator = torch.Generator().manual_seed(4)
    batch: Batch = {
        "latent_BZthw": torch.randn(2, 4, 4, 8, 8, generator=generator),
        "text_BLE": torch.randn(2, 7, 8, generator=generator),
        "text_mask_BL": torch.ones(2, 7, dtype=torch.bool),
        "seed_B": torch.arange(2),
    }
    trainable = DiTTrainable(model, DiffusionObjective())
    plain, fast = both(lambda: gradients(trainable, batch), list(trainable.players.values()), counters)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_stages_compile_the_models_that_they_run() -> None:
    """The vision transformer and the autoencoder below Divot are hidden from torch."""
    resources, nothing, clip = Resources(compile=True), cast(Any, None), DecodeRecipe(fps=8, frames=9, height=16, width=16)
    encoder = Encoder(Encoding(base, "tokens", "fp32", clip, resources))
    shower = Shower(divot(), base().spec().model_copy(update={"recipe": clip}), resources)
    spec: Any = SimpleNamespace(plan=ChunkPlan())
    film = SimpleNamespace(frames=17)
    dit = VideoDiT(DiTConfig(z=4, width=48, depth=3, heads=2, text_width=8, chunk=2))
    sampler = Sampler(cast(Any, film), spec, dit, base(), TextEncoder(TextConfig()), resources)
    measured = divot()
    clips: Any = SimpleNamespace(batches=lambda: [], index=SimpleNamespace(rows={"video": SimpleNamespace(take=pa.array)}))
    assert not list(shown(cast(Any, measured), clips, resources, nothing, 0))
    for models, count in (
        (standing(cast(nn.Module, encoder.model)), 2),
        (standing(shower.tokenizer), 5),
        ([sampler.model, *standing(sampler.tokenizer)], 5),
        (standing(measured), 5),
    ):
        assert len(parts(*models)) == count and all(part._compiled_call_impl is not None for part in parts(*models))


def test_a_copy_is_compiled_by_itself() -> None:
    """As the one that averages are evaluated in."""
    model = base()
    compile_parts(standing(model))
    assert all(part._compiled_call_impl is None for part in parts(copy.deepcopy(model)))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_kernels_compute_what_the_layers_do() -> None:
    """Encoding in bfloat16 and float32, and one step of training, through the compiler that jobs use."""
    torch._dynamo.reset()
    model = shaken(base()).eval()
    assert isinstance(model, Tokenizer)
    video_BCTHW = torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def encoded() -> list[Tensor]:
        with torch.inference_mode():
            exact = model.encode(video_BCTHW).values
            with torch.autocast("cpu", torch.bfloat16):
                return [exact, model.encode(video_BCTHW).values.float()]

    trainable = catalog.trainable(model, ReconstructionObjective())
    plain = [*encoded(), *gradients(trainable, VIDEO)]
    compile_parts(standing(model))
    fast = [*encoded(), *gradients(trainable, VIDEO)]
    torch.testing.assert_close(fast[1], plain[1], rtol=5e-2, atol=5e-2)
    torch.testing.assert_close([fast[0], *fast[2:]], [plain[0], *plain[2:]], rtol=1e-3, atol=1e-4)
