"""Text encoders: the untrained one, and T5 and CLIP as transformers saves them, at toy size."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from kinetok.llm.text import UNTRAINED_WIDTH, TextConfig, TextEncoder

CAPTIONS = ["a cat runs", "a dog runs over the green hill", ""]


@pytest.fixture(scope="module")
def untrained() -> TextEncoder:
    return TextEncoder(TextConfig(max_tokens=16))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("t5"), ByT5Tokenizer()
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=24, d_kv=6, d_ff=16, num_layers=1, num_heads=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=12, bos_token_id=52, eos_token_id=53, pad_token_id=53, **sizes)
    CLIPTextModel(config).save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def test_captions_become_embeddings_and_a_mask(untrained: TextEncoder) -> None:
    text, mask = untrained.encode(CAPTIONS)
    assert (text.shape, text.dtype) == ((3, 16, UNTRAINED_WIDTH), torch.float32) and untrained.width == UNTRAINED_WIDTH
    assert mask.sum(1).tolist() == [len(CAPTIONS[0]) + 1, 16, 1], "one token a byte and one for the end; the long one is cut"
    assert text[~mask].abs().max() == 0 and text.isfinite().all()
    assert not torch.allclose(text[0, :11], text[1, :11])


def test_a_caption_is_encoded_alike_in_any_company(untrained: TextEncoder) -> None:
    together, alone = untrained.encode(CAPTIONS)[0], [untrained.encode([caption])[0] for caption in CAPTIONS]
    torch.testing.assert_close(torch.cat(alone), together)


def test_the_untrained_encoder_is_the_same_everywhere(untrained: TextEncoder) -> None:
    torch.manual_seed(123)
    drawn = torch.rand(1)
    torch.manual_seed(123)
    again = TextEncoder(TextConfig(max_tokens=16))
    assert torch.equal(torch.rand(1), drawn), "and takes nothing from the random numbers of others"
    assert again.digest() == untrained.digest()
    assert torch.equal(again.encode(CAPTIONS)[0], untrained.encode(CAPTIONS)[0])
    assert not any(weight.requires_grad for weight in again.model.parameters())


def test_t5_from_a_folder(t5: Path, untrained: TextEncoder) -> None:
    encoder = TextEncoder(TextConfig(encoder="t5", path=str(t5), max_tokens=16))
    text, mask = encoder.encode(CAPTIONS)
    wanted = T5EncoderModel.from_pretrained(t5)(**ByT5Tokenizer()(CAPTIONS[:1], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(text[0, :11], wanted[0].detach())
    assert text.shape == (3, 16, 24) and mask.sum(1).tolist() == [11, 16, 1] and encoder.width == 24
    assert encoder.digest() != untrained.digest()


def test_clip_from_a_folder(clip: Path) -> None:
    encoder = TextEncoder(TextConfig(encoder="clip", path=str(clip), max_tokens=12))
    text, mask = encoder.encode(["ab c", ""])
    assert text.shape == (2, 12, 16) and encoder.width == 16
    assert mask.sum(1).tolist() == [5, 2], "start, three letters, end"
    assert text.isfinite().all()


def test_clip_as_dynamicrafter_reads_it(clip: Path) -> None:
    """The last layer but one, normalised, at every position; OpenCLIP fills up with zeros and masks nothing but what comes later."""
    plain = TextConfig(encoder="clip", path=str(clip), max_tokens=12)
    encoder = TextEncoder(plain.model_copy(update={"layer": "penultimate", "padding": "read"}))
    text, mask = encoder.encode(["ab c", ""])
    ids = torch.tensor([[52, 0, 27, 28, 53, *7 * [0]], [52, 53, *10 * [0]]])
    model = CLIPTextModel.from_pretrained(clip)
    wanted = model.final_layer_norm(model(input_ids=ids, output_hidden_states=True).hidden_states[1])
    torch.testing.assert_close(text, wanted.detach())
    assert mask.all()
    masked, last = (TextEncoder(plain.model_copy(update=change)).encode(["ab c"])[0] for change in ({"layer": "penultimate"}, {}))
    torch.testing.assert_close(masked[0, :5], text[0, :5])
    assert not masked[0, 5:].any() and (last[0, :5] - masked[0, :5]).abs().max() > 1e-3
    assert plain.model_dump().keys() == {"encoder", "path", "max_tokens"}, "keys of before they were there still hold"


def test_what_is_not_asked_for_is_refused(t5: Path, clip: Path) -> None:
    with pytest.raises(ValueError, match="is a t5 model, not clip"):
        TextEncoder(TextConfig(encoder="clip", path=str(t5)))
    with pytest.raises(ValueError, match="reads 12 tokens at most, 77"):
        TextEncoder(TextConfig(encoder="clip", path=str(clip)))
    for wrong in ({"encoder": "t5"}, {"path": "somewhere"}, {"encoder": "bert", "path": "x"}, {"layer": "penultimate"}):
        with pytest.raises(ValidationError):
            TextConfig.model_validate(wrong)
