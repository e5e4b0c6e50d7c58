"""The language model under Divot-LLM: any causal LM of transformers, and how it is tuned.

A pretrained one comes by folder or hub id; one from numbers has Mistral's architecture (arXiv 2310.06825) and random weights, which is
the full-size model without its files, or a tiny one that speaks bytes. Attention is always SDPA's, which takes the mask of queries.
LoRA (arXiv 2106.09685) comes through peft, put into the model in place: norms, embeddings and output layer are trained whole beside it,
and `merged` gives back the weights of a plain model, which is what is saved and what the next stage of training starts from.
Not covered: quantised bases, adapters other than LoRA, bases whose layers see different positions (`window_of`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from kinetok.llm.divot.vocabulary import Vocabulary
from kinetok.tokenizers.base import Config, Count, import_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEAD_SCALE = 3.0
"""Rows that are added to the output layer start at so many times the mean of the old ones, rows of the embedding at the mean."""
ADAPTER = "default"
LOGIT_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Names that configurations of transformers have for what their models do to logits after the output layer."""


class PretrainedLanguage(Config):
    """A causal language model that somebody trained."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    """Folder or hub id."""


class UntrainedLanguage(Config):
    """A Mistral of these sizes with random weights, over bytes and `words`."""

    kind: Literal["untrained"] = "untrained"
    width: Count
    hidden: Count
    """Width inside the MLPs."""
    depth: Count
    heads: Count
    key_heads: Count
    """Heads of keys and values; divides `heads`."""
    words: str = ""
    """Words, separated by spaces, that are one id each, as in a pretrained model's vocabulary; other text is bytes and parts of words."""
    vocabulary: Count | None = None
    """Rows of the embedding; None makes as many as there are ids."""
    positions: Count = 32768
    """Longest sequence."""
    window: Count | None = None
    """Positions that a layer looks back; None sees all."""
    norm_eps: float = 1e-5
    rotary_base: float = 10_000.0


LanguageConfig: TypeAlias = Annotated[PretrainedLanguage | UntrainedLanguage, Field(discriminator="kind")]


class LoRAConfig(Config):
    """Low-rank adapters beside the frozen projections; defaults are the reference's."""

    rank: Count = 32
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by the last part of their names."""
    trained: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head")
    """Modules that are trained whole."""


def read_vocabulary(config: LanguageConfig) -> Vocabulary:
    """The vocabulary of a model, without the model."""
    return Vocabulary.from_pretrained(config.path) if isinstance(config, PretrainedLanguage) else Vocabulary.of_bytes(config.words.split())


def build_language(config: LanguageConfig) -> "tuple[PreTrainedModel, Vocabulary]":
    """The model, with rows for the visual tokens, and its vocabulary."""
    vocabulary = read_vocabulary(config)
    if isinstance(config, PretrainedLanguage):
        return _pretrained(config.path, vocabulary), vocabulary
    return _untrained(config, vocabulary), vocabulary


def outline_language(config: LanguageConfig) -> "tuple[PreTrainedModel, Vocabulary]":
    """As `build_language`, but of a pretrained model only the architecture: for what it costs, on the meta device."""
    vocabulary = read_vocabulary(config)
    if isinstance(config, UntrainedLanguage):
        return _untrained(config, vocabulary), vocabulary
    from transformers import AutoConfig

    numbers = AutoConfig.from_pretrained(config.path, trust_remote_code=False)
    numbers.vocab_size = max(numbers.vocab_size, len(vocabulary))
    return _from_config(numbers), vocabulary


def empty_language(folder: Path) -> "PreTrainedModel":
    """A model of the architecture that `folder/config.json` describes, with random weights."""
    import_transformers()
    from transformers import AutoConfig

    return _from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def embedding(model: "PreTrainedModel") -> nn.Embedding:
    """The table of what ids enter as."""
    layer = model.get_input_embeddings()
    assert isinstance(layer, nn.Embedding)
    return layer


def output_layer(model: "PreTrainedModel") -> nn.Linear:
    """What makes logits."""
    layer = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(layer, nn.Linear)
    return layer


def window_of(model: "PreTrainedModel") -> int | None:
    """Positions that every layer looks back, None where every layer sees all before it; ValueError where layers differ or see otherwise.

    Without `layer_types`, models of transformers look back `sliding_window` in every layer (Mistral), or have none (Llama). With them
    (Qwen2, Gemma-3) these decide: a `sliding_window` may be of no layer, or of some.
    """
    text = model.config.get_text_config()
    window: int | None = getattr(text, "sliding_window", None)
    kinds = sorted(set(getattr(text, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]))
    if kinds == ["full_attention"]:
        return None
    if kinds == ["sliding_attention"]:
        return window
    raise ValueError(
        f"layers of this {text.model_type} model see what {' and '.join(kinds)} let them, but all of them are given one mask: name a model "
        "of full_attention or of sliding_attention alone"
    )


def _from_config(config: "PretrainedConfig") -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
    return model


def _pretrained(path: str, vocabulary: Vocabulary) -> "PreTrainedModel":
    """Weights come from safetensors alone, and all of them must be there."""
    from transformers import AutoModelForCausalLM

    found: object = AutoModelForCausalLM.from_pretrained(
        path, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    model, report = cast("tuple[PreTrainedModel, dict[str, object]]", found)
    wrong = {name: report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    if wrong:
        raise ValueError(f"the weights at {path} are not those of a {model.config.model_type} model: {wrong}")
    text = model.config.get_text_config()
    scaled = [name for name in LOGIT_SCALES if getattr(text, name, None) not in (None, 1.0)]
    if scaled:
        raise ValueError(f"{path} changes its logits after the output layer ({scaled[0]}), which is not covered: name another model")
    grow_vocabulary(model, vocabulary)
    return model


def _untrained(config: UntrainedLanguage, vocabulary: Vocabulary) -> "PreTrainedModel":
    from transformers import MistralConfig

    rows = config.vocabulary or len(vocabulary)
    if rows < len(vocabulary):
        raise ValueError(f"vocabulary: {rows} rows are too few for {len(vocabulary)} ids")
    numbers = MistralConfig(
        vocab_size=rows,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        max_position_embeddings=config.positions,
        sliding_window=config.window,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return _from_config(numbers)


@torch.no_grad()
def grow_vocabulary(model: "PreTrainedModel", vocabulary: Vocabulary) -> None:
    """Give the embedding and the output layer a row for every id; those of added ids start from the mean of the others (`HEAD_SCALE`).

    A table may have had rows to spare, which stand for no id and of which nothing was learned: they count for nothing, and an added id that
    takes one of them starts as any other.
    """
    if len(vocabulary) > embedding(model).num_embeddings:
        model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    if not vocabulary.added:
        return
    table, head = embedding(model).weight, output_layer(model).weight
    old = torch.ones(len(vocabulary), dtype=torch.bool)
    old[vocabulary.added] = False
    table[vocabulary.added] = table[: len(old)][old].mean(0)
    if head is not table:
        head[vocabulary.added] = HEAD_SCALE * head[: len(old)][old].mean(0)


def tune(model: "PreTrainedModel", lora: LoRAConfig | None) -> None:
    """Make all of the model trainable, or put adapters into it and freeze what `lora` does not name."""
    if lora is None:
        model.requires_grad_(True)
        return
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets))
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for name in lora.trained:
        modules = [module for path, module in model.named_modules() if path.rpartition(".")[2] == name]
        if not modules:
            raise ValueError(f"trained: a {model.config.model_type} model has no module called {name}")
        for module in modules:
            module.requires_grad_(True)


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without adapters, their product added to the weights they stand beside."""
    from peft.tuners.lora import Linear

    adapted = {f"{name}.base_layer.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {
        name.replace(".base_layer.", "."): tensor + adapted[name].get_delta_weight(ADAPTER) if name in adapted else tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
