"""What a new tokenizer measures of its first clips, and what it may leave as it is."""

import pytest
import torch

from kinetok.tokenizers.base import Batch
from kinetok.tokenizers.divot.statistics import BUFFERS, give, measure
from kinetok.tokenizers.divot.tokenizer import DivotConfig, DivotTokenizer


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {
        "vit_BTND": 3 * torch.randn(4, 3, 16, 16, generator=generator) + 1,
        "latent_BTZhw": 2 * torch.randn(4, 3, 4, 4, 4, generator=generator) - 1,
    }


@pytest.mark.parametrize("standardise", [True, False])
def test_features_are_standardised_unless_the_encoder_says_otherwise(model: DivotTokenizer, batch: Batch, standardise: bool) -> None:
    encoder = model.config.encoder.model_copy(update={"standardise": standardise})
    model.config = model.config.model_copy(update={"encoder": encoder})
    found = measure(model, [{name: values[:2] for name, values in batch.items()}, {name: values[2:] for name, values in batch.items()}])
    assert set(found) == set(BUFFERS)
    assert (model.encoder.mean_ND.any() and not torch.allclose(model.encoder.std_D, torch.ones(16), atol=0.5)) == standardise
    torch.testing.assert_close(model.detokenizer.mean_Z, batch["latent_BTZhw"].mean((0, 1, 3, 4)))
    other = DivotTokenizer(model.config, model.vit, model.lower)
    state = give(other, found).state_dict()
    assert all(torch.equal(state[name], found[name]) for name in BUFFERS)


def test_a_model_that_standardises_has_the_key_it_had(config: DivotConfig) -> None:
    assert "standardise" not in config.model_dump()["encoder"]
    plain = config.encoder.model_copy(update={"standardise": False})
    assert plain.model_dump()["standardise"] is False and type(plain).model_validate_json(plain.model_dump_json()) == plain
