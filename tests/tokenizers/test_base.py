"""Token contracts and weight digests."""

import torch
from torch import nn

from kinetok.tokenizers.base import DecodeRecipe, TokenSpec, weights_digest

SPEC = TokenSpec(tokenizer="causal", weights="ab", layout="grid", channels=16, temporal=4, spatial=8)


def test_specs_name_their_first_difference() -> None:
    assert SPEC.difference(SPEC) is None
    assert SPEC.difference(SPEC.model_copy(update={"temporal": 8})) == "temporal: 4, 8"
    recipe = DecodeRecipe(fps=8, frames=17, height=64, width=64)
    assert "recipe: None" in str(SPEC.difference(SPEC.model_copy(update={"recipe": recipe})))


def test_specs_survive_json() -> None:
    assert TokenSpec.model_validate_json(SPEC.model_dump_json()) == SPEC


def test_digest_covers_values_names_shapes_and_types() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    digests = {weights_digest(model), weights_digest(nn.Sequential(model))}
    digests.add(weights_digest(nn.Linear(2, 3)))
    digests.add(weights_digest(model.bfloat16()))
    assert len(digests) == 4


def test_digest_ignores_the_order_of_insertion() -> None:
    forward, backward = nn.Module(), nn.Module()
    for name in ("a", "b"):
        forward.register_parameter(name, nn.Parameter(torch.ones(1)))
    for name in ("b", "a"):
        backward.register_parameter(name, nn.Parameter(torch.ones(1)))
    assert weights_digest(forward) == weights_digest(backward)
