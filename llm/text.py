"""`TextEncoder`: captions to the embeddings that a video generator attends to.

T5 (arXiv 1910.10683; mT5, uMT5 and ByT5 as well) and CLIP (arXiv 2103.00020) come through transformers, by folder or hub id. For runs
without a network there is an "untrained" encoder: a tiny T5 with random weights of a fixed seed that reads bytes. It tells captions
apart, it does not understand them; wherever it is used it is called by that name. There is no null text: a generator takes an empty mask
for that. Not covered: training an encoder, pooled embeddings, decoder-only language models.

Legend: B captions, L text tokens, E text width.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kinetok.tokenizers.base import Config, Count, Seeded, import_transformers, weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNTRAINED: Final = "untrained"
MODEL_TYPES = {"t5": ("t5", "mt5", "umt5"), "clip": ("clip", "clip_text_model")}
"""`model_type` of a transformers configuration, for each encoder."""
PUBLISHED: Final[Mapping[str, Mapping[str, Any]]] = {
    "google/flan-t5-xxl": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}
"""Numbers of encoders in repositories of the hub, as transformers calls them: what they cost is known without their files."""
UNTRAINED_SEED = 0
UNTRAINED_WIDTH = 64


class TextConfig(Config):
    """Which text encoder, and how much of a caption it reads."""

    encoder: Literal["untrained", "t5", "clip"] = UNTRAINED
    path: str | None = None
    """Folder or hub id of a t5 or clip encoder; None for the untrained one."""
    max_tokens: Count = 77
    """Tokens of a caption; longer ones are cut, shorter ones padded under the mask."""
    # Not dumped at their defaults: they would give every stage with a text encoder another key.
    layer: Annotated[Literal["last", "penultimate"], Field(exclude_if=lambda value: value == "last")] = "last"
    """Of CLIP: whose output is normalised and taken. Stable Diffusion 2 and DynamiCrafter take the last but one."""
    padding: Annotated[Literal["masked", "read"], Field(exclude_if=lambda value: value == "masked")] = "masked"
    """Of CLIP: whether what stands after a caption's end is left out, or read like the rest, id 0 in every place, as OpenCLIP has it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.encoder != "clip" and (self.layer, self.padding) != ("last", "masked"):
            raise ValueError(f"layer, padding: are for clip encoders; encoder is {self.encoder}: leave them out")
        if (self.path is None) != (self.encoder == UNTRAINED):
            raise ValueError(f"path: needed by t5 and clip, and by no other encoder; encoder is {self.encoder}, path is {self.path}")
        return self


class TextEncoder:
    """A frozen text encoder with its tokenizer, on the CPU until `to` moves it."""

    def __init__(self, config: TextConfig) -> None:
        """Load what `config` names; ValueError where it is not of that family or does not read that many tokens."""
        self.config = config
        self.tokenizer, self.model = _untrained() if config.path is None else _pretrained(config, config.path)
        self.model.train(False).requires_grad_(False)

    @property
    def width(self) -> int:
        """Numbers of one embedding, E."""
        width: int = self.model.config.hidden_size
        return width

    def to(self, device: torch.device) -> Self:
        """Move the encoder; its answers stay there."""
        self.model.to(device)  # type: ignore[arg-type]  # its wrapper forgets self
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, max_tokens, E), float32 and zero under the mask, and the mask (B, max_tokens), true where there is a token.

        Padding that is read counts as tokens.
        """
        read = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        ).to(self.model.device)
        id_BL, mask_BL = read["input_ids"], read["attention_mask"].bool()
        if self.config.padding == "read":
            id_BL, mask_BL = id_BL.masked_fill(~mask_BL, 0), torch.ones_like(mask_BL)
        text_BLE = self._embedded(id_BL, mask_BL).float()
        return text_BLE.masked_fill(~mask_BL[..., None], 0.0), mask_BL

    def _embedded(self, id_BL: Tensor, mask_BL: Tensor) -> Tensor:
        early = self.config.layer == "penultimate"
        found = self.model(input_ids=id_BL, attention_mask=mask_BL.long(), output_hidden_states=early)
        text_BLE: Tensor = self.model.final_layer_norm(found.hidden_states[-2]) if early else found.last_hidden_state  # type: ignore[operator]
        return text_BLE

    def digest(self) -> str:
        """sha256 over the encoder's weights."""
        return weights_digest(self.model)


def _untrained() -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    """A T5 of a fixed seed over bytes; needs no file."""
    import_transformers()
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    tokenizer = ByT5Tokenizer()
    with Seeded(UNTRAINED_SEED):
        return tokenizer, T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=UNTRAINED_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        )


def outline_encoder(config: TextConfig) -> "PreTrainedModel":
    """The architecture of an encoder, by its published numbers or its settings at `path`: for what it costs, on the meta device."""
    if config.path is None:
        return _untrained()[1]
    import_transformers()
    from transformers import AutoConfig, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    families: dict[str, tuple[Any, Any]] = {"clip": (CLIPTextConfig, CLIPTextModel), "t5": (T5Config, T5EncoderModel)}
    (kind, family), known = families[config.encoder], PUBLISHED.get(config.path)
    numbers = kind(**known) if known is not None else AutoConfig.from_pretrained(config.path, trust_remote_code=False)
    model: PreTrainedModel = family(getattr(numbers, "text_config", numbers))
    return model


def _pretrained(config: TextConfig, path: str) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    """The encoder half of what is saved at `path`; weights are read from safetensors alone, never unpickled."""
    import_transformers()
    from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel

    found = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if found.model_type not in MODEL_TYPES[config.encoder]:
        raise ValueError(f"{path} is a {found.model_type} model, not {config.encoder}: name another path or encoder")
    family = CLIPTextModel if config.encoder == "clip" else AutoModelForTextEncoding
    model = family.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
    positions = getattr(model.config, "max_position_embeddings", config.max_tokens)
    if config.max_tokens > positions:
        raise ValueError(f"max_tokens: {path} reads {positions} tokens at most, {config.max_tokens} are asked for")
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False), model
