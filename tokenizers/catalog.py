"""THE one place to add a tokenizer: its class in `TOKENIZERS`, and what trains it in `trainable`.

The pipelines know tokenizers through this module alone: `TokenizerConfig` and `ObjectiveConfig` for job files, `build` from a config,
`load` from a saved folder.
"""

import json
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

from kinetok.tokenizers.base import CONFIG_FILE, Config, ModelConfig, Tokenizer
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownTokenizer
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.training import ReconstructionObjective, RungTrainable

TOKENIZERS: tuple[type[Tokenizer], ...] = (CausalTokenizer, GrownTokenizer)
BY_KIND = {str(model.config_class.model_fields["kind"].default): model for model in TOKENIZERS}

if TYPE_CHECKING:
    TokenizerConfig: TypeAlias = ModelConfig
else:
    TokenizerConfig = Annotated[reduce(or_, (model.config_class for model in TOKENIZERS)), Field(discriminator="kind")]
"""What a job file may say under `model:`."""

ObjectiveConfig: TypeAlias = ReconstructionObjective
"""What a job file may say under `objective:`."""


def build(config: ModelConfig, lower: Tokenizer | None = None) -> Tokenizer:
    """A fresh, untrained model; `lower` is the frozen model that a grown one stands on."""
    return BY_KIND[config.kind].build(config, lower)


def load(folder: str | Path) -> Tokenizer:
    """The model saved in `folder` with all that it stands on, in eval mode; ValueError where the folder holds none of ours."""
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: save_pretrained writes one beside the weights")
    kind = json.loads(file.read_text()).get("kind")
    if kind not in BY_KIND:
        raise ValueError(f"{file} is of kind {kind!r}, known kinds are {sorted(BY_KIND)}")
    return BY_KIND[kind].from_pretrained(folder)


def trainable(model: Tokenizer, objective: Config) -> RungTrainable:
    """What `kinetok.infra.training.fit` needs to train `model`."""
    if isinstance(model, Rung) and isinstance(objective, ReconstructionObjective):
        return RungTrainable(model, objective)
    raise ValueError(f"a {model.config.kind!r} model is not trained by a {type(objective).__name__}")
