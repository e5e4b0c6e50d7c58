"""The loss of a rung, and that it is the same from cached features and on the fly (contract 5)."""

from pathlib import Path

import pytest
import torch

from kinetok.tokenizers.base import Batch
from kinetok.tokenizers.catalog import load, trainable
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownTokenizer
from kinetok.tokenizers.causal.posterior import seeded_noise
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.training import ReconstructionObjective, RungTrainable, pixels


def make_batch(clips: int = 3, frames: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(3)
    video = torch.randint(0, 256, (clips, frames, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return {"video_BTHWC": video, "seed_B": torch.arange(11, 11 + clips)}


def loss_of(model: Rung, batch: Batch, kl: float = 1e-3) -> torch.Tensor:
    loss, _ = RungTrainable(model, ReconstructionObjective(kl=kl)).players["autoencoder"](batch, 0)
    assert isinstance(loss, torch.Tensor)
    return loss


def cached(model: GrownTokenizer, batch: Batch) -> Batch:
    features = model.lower.growth_features(pixels(batch))
    return batch | {"full_BDthw": features.full_BDthw, "key_BDthw": features.key_BDthw}


def test_pixels_span_minus_one_to_one() -> None:
    bytes_BTHWC = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 1, 3)
    assert pixels({"video_BTHWC": bytes_BTHWC}).flatten().tolist() == pytest.approx([-1, 1, -0.6])
    assert pixels(make_batch()).shape == (3, 3, 9, 16, 16)


def test_loss_is_l1_plus_weighted_kl(base: CausalTokenizer) -> None:
    base.float()
    batch = make_batch()
    video = pixels(batch)
    posterior = base.heads.posterior(base.features(video))
    noise = seeded_noise([11, 12, 13], tuple(posterior.mean_BZthw.shape[1:]), video.device)
    output = base.decode_latent(posterior.sample(noise), 9)
    torch.testing.assert_close(loss_of(base, batch), (output - video).abs().mean() + 1e-3 * posterior.kl().mean())


def test_a_samples_noise_does_not_depend_on_its_company(base: CausalTokenizer) -> None:
    base.float()
    batch = make_batch()
    alone = [loss_of(base, {name: values[i : i + 1] for name, values in batch.items()}) for i in range(3)]
    torch.testing.assert_close(torch.stack(alone).mean(), loss_of(base, batch))
    reseeded = batch | {"seed_B": batch["seed_B"] + 1}
    assert loss_of(base, reseeded) != loss_of(base, batch)


@pytest.mark.parametrize("rung", ["shaken", "twice_grown"])
def test_cached_features_and_features_on_the_fly_give_one_loss_and_one_gradient(rung: str, request: pytest.FixtureRequest) -> None:
    model: GrownTokenizer = request.getfixturevalue(rung).float()
    batch = make_batch(frames=17)
    results = []
    for given in (batch, cached(model, batch)):
        model.zero_grad()
        loss = loss_of(model, given)
        loss.backward()
        results.append((loss.detach(), [weight.grad for weight in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_evaluation_is_per_sample_deterministic_and_the_same_from_cache(shaken: GrownTokenizer) -> None:
    shaken.float()
    batch = make_batch()
    figures = RungTrainable(shaken, ReconstructionObjective()).evaluate(batch)
    assert set(figures) == {"psnr", "l1", "kl"} and all(values.shape == (3,) for values in figures.values())
    torch.testing.assert_close(RungTrainable(shaken, ReconstructionObjective()).evaluate(cached(shaken, batch)), figures)
    reconstruction = shaken.decode(shaken.encode(pixels(batch)))
    torch.testing.assert_close(figures["l1"], (reconstruction - pixels(batch)).abs().flatten(1).mean(1))


def test_frozen_rungs_are_named_hashed_and_outside_every_player(base: CausalTokenizer, twice_grown: GrownTokenizer) -> None:
    training = RungTrainable(twice_grown, ReconstructionObjective())
    assert dict(training.frozen) == {"lower": twice_grown.lower, "lower.lower": base}
    assert training.digest(base) == base.spec().weights
    frozen = {id(weight) for module in training.frozen.values() for weight in module.parameters()}
    assert not frozen & {id(weight) for weight in training.players["autoencoder"].parameters()}
    assert not dict(RungTrainable(base, ReconstructionObjective()).frozen)


def test_gradient_steps_lower_the_loss_and_leave_the_frozen_rung_alone(grown: GrownTokenizer) -> None:
    grown.float()
    before = grown.lower.digest()
    batch = cached(grown, make_batch())
    optimizer = torch.optim.AdamW(grown.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = loss_of(grown, batch, kl=0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert grown.lower.digest() == before


def test_export_is_what_load_reads(shaken: GrownTokenizer, tmp_path: Path) -> None:
    shaken.float()
    trainable(shaken, ReconstructionObjective()).export(tmp_path)
    assert load(tmp_path).spec() == shaken.spec()


def test_autocast_gives_a_float32_loss_near_the_exact_one(shaken: GrownTokenizer) -> None:
    shaken.float()
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_of(shaken, batch)
        rounded.backward()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, loss_of(shaken, batch), rtol=0.05, atol=0.02)
