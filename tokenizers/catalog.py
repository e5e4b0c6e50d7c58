"""THE one place to add a tokenizer: its class in `TOKENIZERS`, and what trains it in `trainable`; an adapter in `PRETRAINED`.

The pipelines know tokenizers through this module alone: `TokenizerConfig` and `ObjectiveConfig` for job files, `build` from a config,
`load` from a saved folder, of ours or of diffusers.
"""

import json
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Discriminator, Field, Tag

from kinetok.tokenizers.base import CONFIG_FILE, Config, ModelConfig, Tokenizer
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownTokenizer
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.causal.training import ReconstructionObjective, RungTrainable
from kinetok.tokenizers.divot.frame_vae import FrameVAE
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
from kinetok.tokenizers.divot.training import DivotObjective, DivotTrainable
from kinetok.tokenizers.divot.unet_training import UNetObjective, UNetTrainable
from kinetok.tokenizers.pretrained.base import CLASS_KEY, Pretrained
from kinetok.tokenizers.pretrained.cogvideox import CogVideoXTokenizer
from kinetok.tokenizers.pretrained.cosmos import CosmosTokenizer
from kinetok.tokenizers.pretrained.ltx import LTXTokenizer
from kinetok.tokenizers.pretrained.wan import WanTokenizer

TOKENIZERS: tuple[type[Tokenizer], ...] = (CausalTokenizer, GrownTokenizer, DivotTokenizer)
"""What jobs build and train."""
PRETRAINED: tuple[type[Pretrained], ...] = (WanTokenizer, CosmosTokenizer, CogVideoXTokenizer, LTXTokenizer, FrameVAE)
"""What others trained: loaded as diffusers saved it, never built from a config."""
BY_KIND = {str(model.config_class.model_fields["kind"].default): model for model in TOKENIZERS}
BY_CLASS = {adapter.class_name: adapter for adapter in PRETRAINED}

if TYPE_CHECKING:
    TokenizerConfig: TypeAlias = ModelConfig
else:
    TokenizerConfig = Annotated[reduce(or_, (model.config_class for model in TOKENIZERS)), Field(discriminator="kind")]
"""What a job file may say under `model:`."""

RECONSTRUCTION = "reconstruction"


def _objective_kind(given: object) -> str:
    """The kind that an objective names; one that names none is for reconstruction, of which alone there used to be jobs."""
    if isinstance(given, dict):
        return str(given.get("kind", RECONSTRUCTION))
    return given.kind if isinstance(given, DivotObjective | UNetObjective) else RECONSTRUCTION


if TYPE_CHECKING:
    ObjectiveConfig: TypeAlias = ReconstructionObjective | DivotObjective | UNetObjective
else:
    ObjectiveConfig = Annotated[
        Annotated[ReconstructionObjective, Tag(RECONSTRUCTION)]
        | Annotated[DivotObjective, Tag("divot")]
        | Annotated[UNetObjective, Tag("divot_unet")],
        Discriminator(_objective_kind),
    ]
"""What a job file may say under `objective:`."""


def build(config: ModelConfig, lower: Tokenizer | None = None) -> Tokenizer:
    """A fresh, untrained model; `lower` is the frozen model that a grown one stands on."""
    return BY_KIND[config.kind].build(config, lower)


def load(folder: str | Path) -> Tokenizer:
    """The model saved in `folder` with all that it stands on, in eval mode; ValueError where the folder holds none that is known."""
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: save_pretrained writes one beside the weights")
    about = json.loads(file.read_text())
    if not isinstance(about, dict):
        raise ValueError(f"{file} holds no settings of a model")
    if CLASS_KEY in about:
        return adapter_of(str(about[CLASS_KEY])).from_pretrained(folder)
    kind = str(about.get("kind"))
    if kind not in BY_KIND:
        raise ValueError(f"{file} is of kind {kind!r}, known kinds are {sorted(BY_KIND)}")
    return BY_KIND[kind].from_pretrained(folder)


def adapter_of(class_name: str) -> type[Pretrained]:
    """The adapter of a class of diffusers; ValueError where there is none."""
    if class_name not in BY_CLASS:
        raise ValueError(f"there is no adapter for diffusers' {class_name}; there are some for {', '.join(sorted(BY_CLASS))}")
    return BY_CLASS[class_name]


def trainable(model: Tokenizer, objective: Config) -> RungTrainable | DivotTrainable | UNetTrainable:
    """What `kinetok.infra.training.fit` needs to train `model`."""
    if isinstance(model, Rung) and isinstance(objective, ReconstructionObjective):
        return RungTrainable(model, objective)
    if isinstance(model, DivotTokenizer) and isinstance(objective, DivotObjective):
        return DivotTrainable(model, objective)
    if isinstance(model, DivotTokenizer) and isinstance(objective, UNetObjective):
        return UNetTrainable(model, objective)
    raise ValueError(f"a {model.config.kind!r} model is not trained by a {type(objective).__name__}")
