"""Pictures with captions, from files to answers: clips of one frame, tokens, sequences with the tag of images, a question about a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.pipelines.conftest import finish
from tests.pipelines.data.videos import PICTURES, encode, moving, picture
from tests.pipelines.stages.running import run_stage
from tests.tokenizers.divot.tiny import tiny_divot

from kinetok.infra.artifact import Artifact, Counts, Store
from kinetok.infra.storage import Folder
from kinetok.llm.divot.generation import Decoding
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.vocabulary import Vocabulary
from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageFeed, LanguageSpec
from kinetok.pipelines.data.language_tasks import Captioning, Generation
from kinetok.pipelines.data.pack import pack
from kinetok.pipelines.data.token_shards import TOKENS, TokenShards
from kinetok.pipelines.divot import VideoLM
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.encode import Encode
from kinetok.pipelines.stages.ingest import Ingest
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
COUNT = 6


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Five frames of 16 x 16 pixels to 4 tokens of 8 numbers."""
    torch.manual_seed(0)
    rung = CausalTokenizer(CausalConfig(channels=8, mult=(1, 2), strides=((2, 2),), blocks=1, z=4, patch=2, groups=4)).eval()
    out = tmp_path_factory.mktemp("divot")
    DivotTokenizer.build(tiny_divot(), rung).save_pretrained(out / "model")
    return finish(Folder(str(out)), "train", Counts())


@pytest.fixture(name="pictures")
def _pictures(tmp_path: Path) -> Path:
    """Files of every format, with captions for all in `captions.csv` beside the folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = ["videoid,name"]
    for number in range(COUNT):
        extension = list(PICTURES)[number % len(PICTURES)]
        (folder / f"{number}.{extension}").write_bytes(picture(moving(1, seed=number)[0], extension))
        rows.append(f"{number},picture {number}")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("form", ["folder", "tars"])
def test_pictures_become_tokens_that_are_read_as_images(tmp_path: Path, pictures: Path, tokenizer: Artifact, form: str) -> None:
    store, captions = Store(Folder(str(tmp_path / "store"))), str(tmp_path / "captions.csv")
    if form == "tars":
        assert pack(str(pictures), str(tmp_path / "tars"), csv=captions).videos == COUNT
        source = Ingest(source=f"{tmp_path}/tars/*.tar")
    else:
        source = Ingest(source=str(pictures), csv=captions)
    fields = {"videos": "videos", "fps": 8, "frames": 1, "height": 16, "width": 16}
    clips = run_stage(store, Clips.model_validate(fields), "clips", {"videos": run_stage(store, source, "videos", {})})
    assert (clips.record.counts.written, clips.record.counts.input) == (COUNT, COUNT)
    tokens = run_stage(store, Encode(data="clips", model="divot", dtype="fp32"), "tokens", {"data": clips, "model": tokenizer})  # type: ignore[arg-type]

    made = LanguageFeed((tokens,), None, (Captioning(), Generation()), "train", Vocabulary.of_bytes, clip_tokens=4, group=2, seed=0)
    vocabulary, texts = Vocabulary.of_bytes(), set()
    for position in range(16):
        sample = made.sample(position)
        assert set(vocabulary.tags("image")) <= set(sample.ids_L) and not set(vocabulary.tags("video")) & set(sample.ids_L)
        texts.add(vocabulary.decode([id for id in sample.ids_L if id not in (*vocabulary.visual, vocabulary.bos, vocabulary.eos)]))
    assert texts == {f"picture {number}" for number in range(COUNT)}

    _same_when_asked(tmp_path, tokens, tokenizer, pictures)


def _same_when_asked(tmp_path: Path, tokens: Artifact, tokenizer: Artifact, pictures: Path) -> None:
    """A model of these tokens, and one of videos, reads a file as it was encoded, and calls it an image."""
    shards, language = TokenShards.open(tokens), tmp_path / "language"
    numbers = UntrainedLanguage(width=32, hidden=48, depth=1, heads=4, key_heads=2)
    DivotLM.build(DivotLMConfig(language=numbers, clip_tokens=4, token_width=8)).save_pretrained(language)
    for frames in (1, 5):
        assert shards.spec.recipe is not None
        spec = shards.spec.model_copy(update={"recipe": shards.spec.recipe.model_copy(update={"frames": frames})})
        (language / LANGUAGE_FILE).write_text(LanguageSpec(tokens=spec, instructed=True).model_dump_json())
        model = VideoLM.open(str(language), str(tokenizer.folder))
        token_CND, media = model.read(pictures / "0.jpg")
        assert media == "image"
        torch.testing.assert_close(token_CND, shards.read(0)[TOKENS].float()[None], atol=1e-4, rtol=1e-4)
        assert isinstance(model.ask(pictures / "0.jpg", "What is it?", decoding=Decoding(temperature=0, max_tokens=2)), str)
        (tmp_path / "v.mp4").write_bytes(encode(moving(6), rate=8))
        assert model.read(tmp_path / "v.mp4")[1] == ("image" if frames == 1 else "video")
    assert np.unique([shards.read(row)[TOKENS].sum() for row in range(COUNT)]).size == COUNT
