"""Costs said beforehand against the same model counted at work."""

from collections.abc import Callable, Iterator
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kinetok.llm.cost import (
    FLOAT,
    Flops,
    Trained,
    TrainingCost,
    count_flops,
    dit_flops,
    dit_parameters,
    pass_cost,
    saved_bytes,
    tokenizer_flops,
    training_cost,
)
from kinetok.llm.dit import DiTConfig, VideoDiT
from kinetok.llm.presets import SIZES, dit
from kinetok.llm.training import DiffusionObjective, DiTTrainable
from kinetok.pipelines.models import growable
from kinetok.tokenizers import catalog
from kinetok.tokenizers.base import Batch, Tokenizer, standing
from kinetok.tokenizers.causal.presets import SMALL_4X, SMALL_GROWN
from kinetok.tokenizers.causal.training import ReconstructionObjective

CONFIG = DiTConfig(z=4, width=48, depth=2, heads=2, text_width=8, chunk=2, mlp_ratio=3.0)


def make_dit() -> Trained:
    return DiTTrainable(VideoDiT(CONFIG), DiffusionObjective())


def make_base() -> Tokenizer:
    return catalog.build(SMALL_4X)


def make_rung(grown: bool) -> Trained:
    return catalog.trainable(catalog.build(SMALL_GROWN, make_base()) if grown else make_base(), ReconstructionObjective())


LATENTS = {
    "latent_BZthw": torch.zeros(2, 4, 4, 8, 8),
    "text_BLE": torch.zeros(2, 7, 8),
    "text_mask_BL": torch.ones(2, 7, dtype=torch.bool),
    "seed_B": torch.arange(2),
}
VIDEO = {"video_BTHWC": torch.zeros(2, 9, 64, 64, 3, dtype=torch.uint8), "seed_B": torch.arange(2)}
CASES: dict[str, tuple[Callable[[], Trained], Batch]] = {
    "dit": (make_dit, LATENTS),
    "base": (lambda: make_rung(grown=False), VIDEO),
    "grown": (lambda: make_rung(grown=True), VIDEO),
}


def learned(player: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in player.parameters() if weight.requires_grad]


def gradients(player: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    return torch.autograd.grad(player(batch, 1)[0], learned(player))


def only(trainable: Trained) -> nn.Module:
    (player,) = trainable.players.values()
    return player


@pytest.fixture(scope="module")
def costs() -> dict[str, TrainingCost]:
    return {name: training_cost(build, batch) for name, (build, batch) in CASES.items()}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_a_transformer(size: str) -> None:
    config = dit(size, z=16, chunk=3)
    with torch.device("meta"):
        assert dit_parameters(config) == sum(weight.numel() for weight in VideoDiT(config).parameters())


@pytest.mark.parametrize("patch", [(1, 1), (2, 1), (1, 2)])
def test_flops_of_a_transformer(patch: tuple[int, int]) -> None:
    config = CONFIG.model_copy(update={"patch": patch})
    model = VideoDiT(config)
    one = {name: values[:1] for name, values in LATENTS.items()}
    player = only(DiTTrainable(model, DiffusionObjective()))
    with torch.no_grad():
        forward = count_flops(lambda: player(one, 1))
    assert dit_flops(config, (4, 8, 8), 7) == Flops(forward, count_flops(lambda: gradients(player, one)))


@pytest.mark.parametrize("name", CASES)
def test_a_pass_without_data_counts_what_a_real_one_does(name: str, costs: dict[str, TrainingCost]) -> None:
    build, batch = CASES[name]
    cost, real = costs[name], build()
    player, frozen = only(real), list(real.frozen.values())
    _, kept = saved_bytes(lambda: player(batch, 1), [player, *frozen])
    assert cost.activations == kept
    assert cost.flops == count_flops(lambda: gradients(player, batch)) // 2
    assert cost.trained == sum(weight.numel() for weight in learned(player))
    assert cost.frozen == sum(weight.numel() for module in frozen for weight in module.parameters())
    assert cost.base == 0


@pytest.mark.parametrize("name", CASES)
def test_activations_are_most_of_what_a_step_allocates(name: str, costs: dict[str, TrainingCost]) -> None:
    """The profiler's live bytes at their peak: activations, gradients that are there already, and what lives for one operation."""
    build, batch = CASES[name]
    cost, player = costs[name], only(build())
    gradients(player, batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        gradients(player, batch)
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    live = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    assert 0.95 * cost.activations < live.max() < 1.2 * (cost.activations + FLOAT * cost.trained)


def test_bf16_keeps_less(costs: dict[str, TrainingCost]) -> None:
    assert training_cost(*CASES["dit"], bf16=True).activations < 0.9 * costs["dit"].activations


def test_memory_of_a_step(costs: dict[str, TrainingCost]) -> None:
    cost = costs["grown"]
    alone, averaged = cost.memory(ema=False), cost.memory(ema=True)
    assert alone.total == FLOAT * (4 * cost.trained + cost.frozen) + cost.activations, "weight, gradient, two moments"
    assert averaged.total - alone.total == 2 * FLOAT * cost.trained
    totals = [cost.memory(ema=True, zero=zero, workers=4).total for zero in range(4)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4


def test_a_base_under_adapters_is_scattered_by_zero_3_and_whole_beside_it() -> None:
    cost = TrainingCost(trained=10, frozen=1000, base=800, flops=1, activations=0)
    assert [cost.memory(ema=ema, zero=2, workers=4).frozen for ema in (False, True)] == [FLOAT * 1000] * 2, "the average's copy shares it"
    assert cost.memory(ema=False, zero=3, workers=4).frozen == FLOAT * (1000 + 200)


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("way", ["both", "features"])
def test_what_a_pass_holds_is_what_it_allocates(grown: bool, way: str) -> None:
    """Against torch's own record of a second pass, which the input is not in, of clips that outweigh the workspaces of convolutions;
    and FLOPs against the counter's, of whole numbers."""
    shape = (2, 3, 17, 64, 64)

    def make() -> Tokenizer:
        base = catalog.build(SMALL_4X)
        return catalog.build(SMALL_GROWN, base) if grown else base

    def work(model: Tokenizer, video_BCTHW: torch.Tensor) -> object:
        return model.decode(model.encode(video_BCTHW)) if way == "both" else growable(model).growth_features(video_BCTHW)

    def once(model: Tokenizer) -> Iterator[int]:
        work(model, torch.zeros(shape))
        yield 1

    model, video, found = make().eval(), torch.zeros(shape), pass_cost(lambda: [make()], once, 2, dtype=torch.float32)
    assert found.parameters == sum(weight.numel() for each in standing(model) for weight in each.parameters())
    assert len(standing(model)) == 1 + grown and found.memory == FLOAT * found.parameters + found.alive
    with torch.no_grad():
        work(model, video)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work(model, video)
    events = sorted((event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda at: at.start_ns())
    peak = max(accumulate(event.nbytes() for event in events)) + video.untyped_storage().nbytes()
    assert found.alive == pytest.approx(peak, rel=0.1)
    with torch.no_grad():
        assert found.flops == count_flops(lambda: work(model, video)) // 2


def test_half_the_clips_and_half_the_bytes_are_less_alive() -> None:
    def alive(clips: int, dtype: torch.dtype) -> int:
        def work(model: Tokenizer) -> Iterator[int]:
            model.decode(model.encode(torch.zeros(clips, 3, 17, 64, 64)))
            yield 1

        return pass_cost(lambda: [make_base()], work, clips, dtype=dtype).alive

    assert alive(1, torch.float32) < 0.6 * alive(2, torch.float32) and alive(2, torch.bfloat16) < alive(2, torch.float32)


def test_of_equal_steps_one_is_taken() -> None:
    def work(model: Tokenizer) -> Iterator[int]:
        tokens = model.encode(torch.zeros(2, 3, 9, 32, 32))
        yield 1
        model.decode(tokens)
        yield 3
        model.decode(tokens)
        yield 0

    encoding, decoding = tokenizer_flops(make_base, (2, 3, 9, 32, 32))
    assert pass_cost(lambda: [make_base()], work, 2, dtype=torch.float32).flops == (encoding + 3 * decoding) // 2


def test_flops_of_a_tokenizer() -> None:
    video = torch.zeros(1, 3, 9, 32, 32)
    model = make_base()
    tokens = model.encode(video)
    real = (count_flops(lambda: model.encode(video)), count_flops(lambda: model.decode(tokens)))
    assert tokenizer_flops(make_base, video.shape) == real
    pair = tokenizer_flops(make_base, (2, *video.shape[1:]))
    assert pair == (2 * real[0], 2 * real[1]), "one clip alone is convolved by another kernel, which counts alike"
