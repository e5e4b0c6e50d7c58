"""From token shards to a language model, to tokens that it writes and answers that it gives: no pixel, no tokenizer."""

import itertools
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines.data.token_artifacts import SPEC, TOKENS, WIDTH, caption, clip_tokens, make_instructions, make_tokens
from tests.pipelines.stages.running import run_stage
from tests.pipelines.stages.test_train import Alone

from kinetok.infra.artifact import Artifact, Counts, Store
from kinetok.infra.errors import ConfigError, ContractError, DataError
from kinetok.infra.fit import SUMMARY, TURN
from kinetok.infra.job import Job, parse_job
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.stage import Resources, StageContext
from kinetok.infra.storage import Folder
from kinetok.infra.training import Loop, Work
from kinetok.llm.divot import scoring, sequences
from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.generation import complete, make_clips
from kinetok.llm.divot.model import DivotLM
from kinetok.llm.divot.sequences import ask_caption, ask_clip, describe
from kinetok.pipelines import models
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.data import written_shards
from kinetok.pipelines.data.instructions import Story
from kinetok.pipelines.data.language_feed import LanguageSpec
from kinetok.pipelines.data.language_tasks import Answering, Captioning, Storytelling
from kinetok.pipelines.data.order import sample_seed
from kinetok.pipelines.data.token_shards import Shards, TokenShards, read_index
from kinetok.pipelines.data.verify import problems
from kinetok.pipelines.data.written_shards import Captions, Drawing, Writing, _Worker
from kinetok.pipelines.estimate import estimates
from kinetok.pipelines.models import language_spec, open_language
from kinetok.pipelines.report.tables import ANSWERS, Answers
from kinetok.pipelines.stages import language
from kinetok.pipelines.stages.language import Language
from kinetok.pipelines.stages.understand import Understand
from kinetok.pipelines.stages.write import Write

TINY = {"kind": "untrained", "width": 32, "hidden": 48, "depth": 2, "heads": 4, "key_heads": 2}
MODEL = {"language": TINY, "clip_tokens": TOKENS, "token_width": WIDTH, "head": {"kind": "gmm", "components": 2, "floor": 0.01}}
FIT = {"steps": 3, "global_batch": 4, "optimizers": {"divot_lm": {"lr": 1e-3}}, "log_every": 1, "eval_every": 3}
TASKS = [{"kind": "captioning"}, {"kind": "generation"}]
LANGUAGE = {"tokens": ["tokens"], "model": MODEL, "tasks": TASKS, **FIT}
TUNED = LANGUAGE | {
    "start": "language",
    "instructions": "instructions",
    "model": None,
    "objective": {"lora": {"rank": 2}},
    "tasks": [{"kind": "answering"}, {"kind": "generation", "instructed": True}],
}


def fit(build: Any, feed: Any, validation: Any, config: Any, *, out: Folder, resources: Resources, **_: object) -> dict[str, float]:
    """`fit` without the workers of Ray Train."""
    out.write_text(TURN, "mine")
    Loop(Work(build, feed, validation, config, out, resources, "mine"), Alone()).run()
    out.write_text(SUMMARY, "{}")
    return {name: value for name, value in read_metrics(out)[-1].items() if value is not None}


@pytest.fixture(scope="module")
def store(process_group: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A pre-trained and a tuned model, on made-up tokens of twelve videos."""
    folder = tmp_path_factory.mktemp("language")
    made = Store(Folder(str(folder / "store")))
    tokens = make_tokens(folder / "tokens", 12, val=(3, 7, 10))
    instructions = make_instructions(folder / "instructions", range(12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "fit", fit)
        first = train(made, "language", LANGUAGE, tokens=(tokens,))
        train(made, "tuned", TUNED, tokens=(tokens,), start=first, instructions=instructions)
    yield made


def train(store: Store, name: str, fields: dict[str, Any], **inputs: Any) -> Artifact:
    return run_stage(store, Language.model_validate(fields), name, inputs)


@pytest.fixture(scope="module")
def folder(store: Store) -> Path:
    return store.root.local.parent


def found(folder: Path, name: str) -> Artifact:
    artifact = Store(Folder(str(folder))).read(Folder(str(folder / name)))
    assert artifact is not None
    return artifact


@pytest.mark.slow
def test_a_trained_model_knows_whose_tokens_it_reads(store: Store) -> None:
    for name, instructed in (("language", False), ("tuned", True)):
        made = store.find(name)
        assert not list(problems(made))
        assert language_spec(made) == LanguageSpec(tokens=SPEC, instructed=instructed)
        card = made.folder.read_text("model/README.md")
        assert "## How it was trained" in card and SPEC.weights in card and "| lm_loss |" in card.split("## Figures")[1]
        assert ("| start | `language-" in card) == instructed
        line = read_metrics(made.folder)[-1]
        assert {"train/lm_loss", "train/tokens", "train/tokens_per_second", "val/lm_loss", "val/head_loss"} <= line.keys()
        assert line["val/perplexity"] == pytest.approx(math.exp(line["val/lm_nats"] / line["val/lm_labels"]))
        reads = "answering" if instructed else "captioning"
        assert line["val/perplexity"] == line[f"val/{reads}/perplexity"] and line["val/head_loss"] == line["val/generation/head_loss"]
        assert not {f"val/{reads}/head_loss", "val/generation/perplexity"} & line.keys()
        assert f"| {reads}/perplexity |" in card and "lm_nats" not in card
        assert made.record.metrics["validation_samples"] == 6
        assert line["train/tokens_per_second"] == pytest.approx(line["train/tokens"] * line["train/samples_per_second"])


@pytest.mark.slow
def test_tuning_starts_from_the_trained_weights_and_leaves_the_base_alone(store: Store) -> None:
    before, after = (open_language(store.find(name)).state_dict() for name in ("language", "tuned"))
    drift = {name: float((after[name] - tensor).abs().max()) for name, tensor in before.items()}
    assert 0 < max(drift.values()) < 0.02
    assert max(drift["llm.model.norm.weight"], drift["to_head.0.weight"]) > 0


@pytest.mark.slow
def test_validation_is_of_every_held_out_sample(store: Store, folder: Path) -> None:
    """Whatever the batch: the figure is that of all three captions, by their own sequences."""
    made, videos, labels, nats = store.find("language"), (3, 7, 10), 0, 0.0
    model = open_language(made)
    for video in videos:
        sample = describe(model.vocabulary, clip_tokens(video, 0)[None], caption(video), limit=2048)
        with torch.no_grad():
            losses = model(collate([sample], [0]))
        nats, labels = nats + float(losses.text_BM.sum()), labels + int(losses.labelled_BM.sum())
    assert read_metrics(made.folder)[-1]["val/perplexity"] == pytest.approx(math.exp(nats / labels), rel=1e-4)


@pytest.mark.slow
def test_a_val_split_that_has_nothing_for_the_tasks_ends_no_training(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and what is learned of instructions is not forgotten by a training without any; nor are stories of both splits."""
    monkeypatch.setattr(language, "fit", fit)
    told: list[str] = []
    stories = [Story(request="R", clips=(f"v/{first:04d}", f"v/{second:04d}"), texts=("x", "y")) for first, second in ((0, 1), (1, 3))]
    asked = make_instructions(tmp_path / "i", [0, 1, 2, 4], stories)
    asked.record.metrics["stories"] = 2.0
    tasks = [{"kind": "answering"}, {"kind": "storytelling", "reread": True}]
    fields = TUNED | {"tasks": tasks, "steps": 1, "objective": {}}
    inputs = {"tokens": (found(folder, "tokens"),), "start": store.find("language"), "instructions": asked}
    own = Store(Folder(str(tmp_path / "store")))
    made = run_stage(own, Language.model_validate(fields), "few", inputs, lambda now: told.append(now.get("note") or ""))
    assert told[0].split("; ") == [
        "not learned, for the clips they are of: 1 divided stories",
        "not validated, for the val split has nothing of it: answering, storytelling",
    ]
    assert made.record.metrics["validation_samples"] == 0 and made.record.metrics["divided_stories"] == 1
    assert not [name for name in read_metrics(made.folder)[-1] if name.startswith("val/")]
    assert (language_spec(made).instructed, language_spec(made).rereads) == (True, True)
    plain = LANGUAGE | {"model": None, "start": "few", "steps": 1, "tasks": [{"kind": "generation"}]}
    after = run_stage(own, Language.model_validate(plain), "after", {"tokens": (found(folder, "tokens"),), "start": made})
    assert (language_spec(after).instructed, language_spec(after).rereads) == (True, True)


@pytest.mark.slow
def test_a_model_of_pictures_and_videos_writes_either(store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "fit", fit)
    assert SPEC.recipe is not None
    still = SPEC.model_copy(update={"recipe": SPEC.recipe.model_copy(update={"frames": 1})})
    tokens, pictures = found(folder, "tokens"), make_tokens(tmp_path / "t", 6, spec=still)
    tasks = [{"kind": "generation"}, {"kind": "generation", "source": 1}]
    fields = LANGUAGE | {"tokens": ["tokens", "pictures"], "steps": 1, "tasks": tasks}
    own = Store(Folder(str(tmp_path / "store")))
    made = run_stage(own, Language.model_validate(fields), "both", {"tokens": (tokens, pictures)})
    assert language_spec(made) == LanguageSpec(tokens=SPEC, instructed=False, other=still)
    assert {"val/generation0/head_loss"} == {
        name for name in read_metrics(made.folder)[-1] if name.startswith("val/generation") and "/head_loss" in name
    }
    spoken = []
    monkeypatch.setattr(written_shards, "each_on_actors", lambda stage, opened, items, **_: (opened()(item) for item in items))
    monkeypatch.setattr(written_shards, "ask_clip", lambda *words, **form: spoken.append(form["media"]) or ask_clip(*words, **form))
    for media, spec in ((None, SPEC), ("image", still)):
        stage = Write(model="both", prompts=("a disc",), dtype="fp32", media=media)  # type: ignore[arg-type]
        shards = TokenShards.open(run_stage(own, stage, f"written-{media}", {"model": made}))
        assert shards.spec == spec and shards.about(0)["end"] == (spec.recipe or SPEC.recipe).frames / 8
    assert spoken == ["video", "image"]
    with pytest.raises(ContractError, match="the model learned tokens of videos alone: train it on a source of images too"):
        stage.run(
            StageContext(
                "x", "0" * 16, {"model": store.find("tuned")}, Folder(str(tmp_path / "o")), Resources(), lambda **_: None, threading.Event()
            )
        )
    assert "media" not in Write(model="both", prompts=("a",)).literals()  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_model_that_knows_no_questions_is_shown_the_clips_alone(store: Store, folder: Path) -> None:
    """As `ask` does; of long videos the first clip of each part, said beside the figures."""
    inputs = {"model": store.find("language"), "tokens": found(folder, "tokens"), "instructions": found(folder, "instructions")}
    stage = Understand(model="language", tokens="tokens", instructions="instructions", decoding={"temperature": 0, "max_tokens": 4})  # type: ignore[arg-type]
    answers = Answers.model_validate_json(run_stage(store, stage, "blank", inputs).folder.read_bytes(ANSWERS))
    assert answers.protocol.prompt == "<s><vid><frame>{tokens}</frame></vid>" and "the first of each" in answers.protocol.windows
    model = open_language(store.find("language"))
    for item in answers.asked:
        prompt = ask_caption(model.vocabulary, clip_tokens(int(item.video[-4:]), 0)[None])
        assert complete(model, [prompt], [0], stage.decoding)[0].strip() == item.said


@pytest.mark.slow
def test_of_a_long_video_the_first_clip_of_each_part_is_asked_about(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[list[int]] = []
    before = sequences.ask

    def spy(vocabulary: Any, clips_CND: torch.Tensor, *words: Any, **form: Any) -> Any:
        shown.append((clips_CND[:, 0, 0] % 100 // 10).int().tolist())
        return before(vocabulary, clips_CND, *words, **form)

    monkeypatch.setattr(sequences, "ask", spy)
    tokens = make_tokens(tmp_path / "t", 2, clips=9, val=(0,))
    inputs = {"model": store.find("tuned"), "tokens": tokens, "instructions": make_instructions(tmp_path / "i", [0])}
    fields = {"model": "tuned", "tokens": "tokens", "instructions": "instructions", "clips": 3, "questions": 1}
    run_stage(store, Understand.model_validate(fields | {"decoding": {"temperature": 0, "max_tokens": 1}}), "long", inputs)
    assert shown[0] == [0, 3, 6]


@pytest.mark.slow
def test_a_model_and_tokens_that_do_not_fit_are_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    tokens = found(folder, "tokens")
    wide = Language.model_validate(LANGUAGE | {"model": MODEL | {"token_width": 9}})
    ctx = StageContext("x", "0" * 16, {"tokens": (tokens,)}, Folder(str(tmp_path / "o")), Resources(), lambda **_: None, threading.Event())
    with pytest.raises(ContractError, match="tokens of 9 numbers, the data have 8: set token_width"):
        wide.run(ctx)
    other = make_tokens(tmp_path / "t", 12, spec=SPEC.model_copy(update={"weights": "b" * 64}))
    ctx.inputs = {"tokens": (other,), "start": store.find("language"), "instructions": found(folder, "instructions")}
    with pytest.raises(ContractError, match="another tokenizer than the rest: weights"):
        Language.model_validate(TUNED).run(ctx)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_frozen_base_is_watched_where_a_rank_holds_it_whole(zero: int) -> None:
    """Where it is not, the contract that it breaks says so."""
    stage = Language.model_validate(LANGUAGE | {"objective": {"lora": {"rank": 2}}})
    made = language.build_trainable(stage.model, None, stage.objective, Resources(zero=zero), ())
    assert (set(made.frozen) == {"base"}) is (zero < 3)
    text = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text()
    contract = text[text.index("4. **Frozen means frozen.**") : text.index("5. **Same data, same loss.**")]
    assert all("not" in said and "ZeRO-3" in said for said in (contract, str(language.__doc__)))


def test_questions_that_name_no_video_of_the_tokens_end_a_training_before_it_starts(tmp_path: Path) -> None:
    """Of the sources that are asked about alone; some unknown ones are counted, of both splits together."""
    one, other = make_tokens(tmp_path / "a", 6, val=(1,)), make_tokens(tmp_path / "b", 9)
    told = Story(request="Tell me.", clips=("v/0005", "v/0007"), texts=("First.", "Then."))
    asked = make_instructions(tmp_path / "i", [0, 1, 5, 8], [told])
    answering, telling = Answering(), Storytelling(source=1)
    expected = {"unknown_questions": 2.0, "unknown_stories": 0.0, "divided_stories": 0.0}
    assert language.unknown_to((answering, telling), (one, other), asked) == expected
    assert language.unknown_to((answering, Answering(source=1)), (one, other), asked) == {"unknown_questions": 0.0}
    lost = {"unknown_stories": 1.0, "divided_stories": 0.0}
    assert language.unknown_to((Captioning(), Storytelling()), (one, other), asked) == lost
    assert language.unknown_to((Captioning(),), (one, other), asked) == language.unknown_to((answering,), (one,), None) == {}
    ctx = StageContext(
        "x",
        "0" * 16,
        {"tokens": (one,), "start": one, "instructions": make_instructions(tmp_path / "j", [7, 8])},
        Folder(str(tmp_path / "o")),
        Resources(),
        lambda **_: None,
        threading.Event(),
    )
    stage = Language.model_validate(LANGUAGE | {"instructions": "instructions", "tasks": [{"kind": "answering"}]})
    with pytest.raises(ContractError, match="instructions names no video that encode holds: it names 'v/0007', 'v/0008', encode 'v/0000'"):
        stage.run(ctx)


@pytest.mark.ray
@pytest.mark.slow
def test_written_tokens_are_shards_of_the_tokenizer(ray_cluster: None, store: Store, tmp_path: Path) -> None:
    """What is written comes from the seed alone, and a run that was killed writes the rest with the same bytes."""
    prompts = tuple(f"a prompt {number}" for number in range(70))
    stage = Write(model="tuned", prompts=prompts, dtype="fp32")  # type: ignore[arg-type]
    made = run_stage(store, stage, "written", {"model": store.find("tuned")})
    assert not list(problems(made)) and made.record.counts.written == 70
    shards = TokenShards.open(made)
    assert shards.spec == SPEC and shards.rows["shard"].to_pylist() == [0] * 64 + [1] * 6
    first = shards.get("prompts/000000/0")["tokens"]
    assert first.shape == (TOKENS, WIDTH) and not torch.equal(first, shards.get("prompts/000001/0")["tokens"])
    assert shards.about(69) == {
        "id": "prompts/000069/0",
        "video": "prompts/000069",
        "caption": "a prompt 69",
        "split": "val",
        "start": 0.0,
        "end": 5 / 8,
    }
    again = Folder(str(tmp_path / "again"))
    for name in ("shards/000000.tar", "index/000000.parquet", "spec.json"):
        again.write_bytes(name, made.folder.read_bytes(name))
    again.write_bytes("shards/000001.tar", b"half")
    told: list[int] = []
    ctx = StageContext(
        "x", "0" * 16, {"model": store.find("tuned")}, again, Resources(), lambda **now: told.append(now["done"]), threading.Event()
    )
    stage.run(ctx)
    assert told == [64, 70]
    assert {name: again.read_bytes(name) for name in again.files()} == {
        name: made.folder.read_bytes(name) for name in made.folder.files() if name != "record.json"
    }


def test_a_file_of_prompts_is_known_by_what_it_says(tmp_path: Path) -> None:
    """One a line, blank ones left out; another text is another key."""
    file = tmp_path / "prompts.txt"
    stage = Write(model="tuned", prompts=str(file))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"there is no file .*prompts\.txt"):
        stage.facts()
    file.write_bytes("\ufeffa red disc\r\n\n  \na caf\u00e9\n".encode())
    assert stage._prompts() == ("a red disc", "a caf\u00e9")
    before = stage.key({"model": "m"})
    os.utime(file, (0, 0))
    assert stage.key({"model": "m"}) == before
    file.write_text("a red disc\n")
    assert stage.key({"model": "m"}) != before
    file.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"prompts\.txt is not UTF-8 text"):
        stage._prompts()


@pytest.mark.ray
@pytest.mark.slow
def test_prompts_of_a_file_are_written_as_those_of_the_job(ray_cluster: None, store: Store, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red disc\n\na blue star\n")
    inputs = {"model": store.find("tuned")}
    named = Write(model="tuned", prompts=str(tmp_path / "prompts.txt"), dtype="fp32")  # type: ignore[arg-type]
    listed = Write(model="tuned", prompts=("a red disc", "a blue star"), dtype="fp32")  # type: ignore[arg-type]
    made = [run_stage(store, stage, name, inputs) for stage, name in ((named, "named"), (listed, "listed"))]
    assert [made[0].folder.read_bytes(name) == made[1].folder.read_bytes(name) for name in made[0].record.files] == [True] * len(
        made[0].record.files
    )
    assert [TokenShards.open(made[0]).about(row)["caption"] for row in range(2)] == ["a red disc", "a blue star"]


@pytest.mark.ray
@pytest.mark.slow
def test_captions_of_clips_are_written_under_their_ids(ray_cluster: None, store: Store, make_clips: Any) -> None:
    clips = make_clips(3, windows=2, shard_clips=4, val=(1,))
    made = run_stage(store, Write(model="language", data="clips"), "of-clips", {"model": store.find("language"), "data": clips})  # type: ignore[arg-type]
    shards = TokenShards.open(made)
    assert shards.rows["id"].to_pylist() == [f"video-{video:03d}/{start}" for video in range(3) for start in (0, 625)]
    assert shards.rows["shard"].to_pylist() == [0, 0, 0, 0, 1, 1]
    assert [shards.about(row)["split"] for row in range(6)] == ["train", "train", "val", "val", "train", "train"]


def written(store: Store, out: Path, draws: int) -> dict[str, torch.Tensor]:
    """What an actor writes of 3 prompts, the last sample of the shard."""
    model = store.find("tuned")
    captions = Captions(None, ("one", "two", "three"), 1.0)
    work = Writing(model, "video", True, captions, Drawing(5, draws, 1.0), "fp32", Resources(batch_size=2), Folder(str(out)))
    _Worker(work)({"shard": 0})
    return Shards(work.out, read_index(work.out)).get("prompts/000002/0")


@pytest.mark.slow
def test_more_draws_of_a_clip_leave_the_first_as_it_is(store: Store, tmp_path: Path) -> None:
    """Each from (seed, place, draw) alone; one draw is the file that it always was, and so is the key."""
    one, three = (written(store, tmp_path / str(draws), draws) for draws in (1, 3))
    assert one.keys() == {"tokens"} and three["draws"].shape == (2, TOKENS, WIDTH)
    assert torch.equal(one["tokens"], three["tokens"])
    drawn = [three["tokens"], *three["draws"]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    model = open_language(store.find("tuned"))
    prompt = ask_clip(model.vocabulary, "three", instructed=True)
    seeds = [sample_seed(5, 2), *(sample_seed(sample_seed(5, 2), draw) for draw in (1, 2))]
    for seed, tokens in zip(seeds, drawn, strict=True):
        torch.testing.assert_close(make_clips(model, [prompt], [seed], variance_scale=1.0)[0], tokens, rtol=1e-4, atol=1e-4)
    plain = Write.model_validate({"model": "m", "prompts": ["a"]})
    assert "draws" not in plain.literals() and plain.model_copy(update={"draws": 2}).literals()["draws"] == 2


@pytest.mark.slow
def test_answers_are_scored_by_kind_beside_chance_and_another_clip(store: Store, folder: Path) -> None:
    inputs = {"model": store.find("tuned"), "tokens": found(folder, "tokens"), "instructions": found(folder, "instructions")}
    stage = Understand(model="tuned", tokens="tokens", instructions="instructions", decoding={"temperature": 0, "max_tokens": 4})  # type: ignore[arg-type]
    made = run_stage(store, stage, "answers", inputs)
    answers = Answers.model_validate_json(made.folder.read_bytes(ANSWERS))
    assert [(score.about, score.questions, score.chance) for score in answers.scores] == [
        ("odd", 3, 0.5),
        ("which", 3, pytest.approx(1 / 12)),
        ("all", 6, pytest.approx((0.5 + 1 / 12) / 2)),
    ]
    assert {item.video for item in answers.asked} == {"v/0003", "v/0007", "v/0010"}
    assert all(item.chosen in item.options for item in answers.asked)
    right = [item.chosen == item.answer for item in answers.asked]
    assert made.record.metrics["all/choice"] == sum(right) / 6
    assert made.record.counts == Counts(input=6, written=6)


@pytest.mark.slow
@pytest.mark.parametrize("split", [(1,), (1, 3)])
def test_a_split_of_one_video_has_no_control(store: Store, folder: Path, tmp_path: Path, split: tuple[int, ...]) -> None:
    """Its own clips shown as another's would give the figure itself."""
    tokens, asked = make_tokens(tmp_path / "t", 4, val=split), make_instructions(tmp_path / "i", range(4))
    stage = Understand(model="tuned", tokens="tokens", instructions="instructions", decoding={"temperature": 0, "max_tokens": 1})  # type: ignore[arg-type]
    inputs = {"model": store.find("tuned"), "tokens": tokens, "instructions": asked}
    made = run_stage(store, stage, f"control{len(split)}", inputs)
    answers = Answers.model_validate_json(made.folder.read_bytes(ANSWERS))
    figures = {name for name, value in made.record.metrics.items() if value is not None and "blindly_" in name}
    alone = len(split) == 1
    assert all((item.blindly_said, item.blindly_exact, item.blindly_nats) == (None, None, None) for item in answers.asked) is alone
    assert (figures == set()) is alone and answers.protocol.control.startswith("none, for the split") is alone
    assert {"all/exact", "all/choice", "all/perplexity"} < made.record.metrics.keys() and len(answers.asked) == 2 * len(split)


@pytest.mark.slow
def test_figures_of_answers_stand_with_their_protocol(store: Store, folder: Path) -> None:
    inputs = {"model": store.find("tuned"), "tokens": found(folder, "tokens"), "instructions": found(folder, "instructions")}
    fields = {"model": "tuned", "tokens": "tokens", "instructions": "instructions", "clips": 3, "seed": 5, "questions": 2}
    made = run_stage(store, Understand.model_validate(fields | {"decoding": {"temperature": 0.5, "max_tokens": 2}}), "told", inputs)
    protocol = Answers.model_validate_json(made.folder.read_bytes(ANSWERS)).protocol
    assert protocol.prompt == "<s>[INST] <vid><frame>{tokens}</frame></vid>{question} [/INST]\n"
    assert (protocol.clips, protocol.seed, protocol.max_tokens, protocol.temperature, protocol.top_p) == (3, 5, 2, 0.5, 0.5)
    assert (protocol.matching, protocol.choice, protocol.perplexity) == (scoring.MATCHING, scoring.CHOICE, scoring.PERPLEXITY)


@pytest.mark.slow
def test_perplexity_of_answers_is_that_of_their_ids_beside_another_clip(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each question's own text and clip; of three videos, the one after stands in. The model is made to tell them apart."""

    def attentive(artifact: Artifact) -> DivotLM:
        model = open_language(artifact)
        with torch.no_grad():
            first: torch.nn.Linear = model.from_tokens[0]
            first.bias -= 700 * first.weight.sum(1)
            model.llm.get_output_embeddings().weight.mul_(10)
        return model

    monkeypatch.setattr(models, "open_language", attentive)
    inputs = {"model": store.find("tuned"), "tokens": found(folder, "tokens"), "instructions": found(folder, "instructions")}
    stage = Understand(model="tuned", tokens="tokens", instructions="instructions", decoding={"temperature": 0, "max_tokens": 1})  # type: ignore[arg-type]
    made = run_stage(store, stage, "surprised", inputs, resources=Resources(batch_size=4))
    answers = Answers.model_validate_json(made.folder.read_bytes(ANSWERS))
    model, videos, figures = attentive(store.find("tuned")), [3, 7, 10], made.record.metrics
    for name, after in (("perplexity", 0), ("blindly_perplexity", 1)):
        nats = ids = 0.0
        for item in answers.asked:
            shown = videos[(videos.index(int(item.video[-4:])) + after) % 3]
            costs = scoring.cost(model, clip_tokens(shown, 0)[None], item.question, [item.answer], limit=500)
            nats, ids = nats + float(costs.nats_O), ids + len(item.answer.encode()) + 1
        assert figures[f"all/{name}"] == pytest.approx(math.exp(nats / ids), rel=1e-4)
    assert figures["all/perplexity"] != pytest.approx(figures["all/blindly_perplexity"], rel=1e-2)


@pytest.mark.slow
def test_questions_about_unknown_videos_are_counted_or_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    inputs = {
        "model": store.find("tuned"),
        "tokens": found(folder, "tokens"),
        "instructions": make_instructions(tmp_path / "i", [3, 4, 12, 13]),
    }
    stage = Understand(model="tuned", tokens="tokens", instructions="instructions", decoding={"temperature": 0, "max_tokens": 1})  # type: ignore[arg-type]
    assert run_stage(store, stage, "some", inputs).record.counts == Counts(input=6, written=2, filtered=4)
    inputs["instructions"] = make_instructions(tmp_path / "j", [12, 13])
    with pytest.raises(
        ContractError,
        match="instructions names no video that encode holds: it names 'v/0012', 'v/0013', encode 'v/0000', 'v/0001', 'v/0002'; call",
    ):
        run_stage(store, stage, "none", inputs)


@pytest.mark.slow
def test_drawn_answers_do_not_depend_on_the_batch(store: Store, folder: Path) -> None:
    inputs = {"model": store.find("tuned"), "tokens": found(folder, "tokens"), "instructions": found(folder, "instructions")}
    fields = {"model": "tuned", "tokens": "tokens", "instructions": "instructions", "seed": 3}
    stage = Understand.model_validate(fields | {"decoding": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6}})
    said = []
    for size in (1, 4):
        made = run_stage(store, stage, f"drawn{size}", inputs, resources=Resources(batch_size=size))
        answers = Answers.model_validate_json(made.folder.read_bytes(ANSWERS))
        said.append([(item.said, item.blindly_said, item.chosen) for item in answers.asked])
    assert said[0] == said[1] and len({text for text, _, _ in said[0]}) > 1


def job(**changes: Any) -> Job:
    """A job with some fields of its language stages changed."""
    stages = {
        "scenes": {"kind": "scenes"},
        "videos": {"kind": "ingest", "made_by": "scenes"},
        "clips": {"kind": "clips", "videos": "videos", "fps": 8, "frames": 17, "height": 64, "width": 64},
        "base": {"kind": "model", "where": "x"},
        "tokens": {"kind": "encode", "data": "clips", "model": "base"},
        "instructions": {"kind": "instructions", "scenes": "scenes", **changes.pop("instructions", {})},
        "language": {"kind": "language", **LANGUAGE, **changes.pop("language", {})},
        "tuned": {"kind": "language", **TUNED, **changes.pop("tuned", {})},
        "written": {"kind": "write", "model": "tuned", "data": "clips", **changes.pop("written", {})},
    }
    return parse_job({"name": "j", "stages": stages, "resources": {"default": {"batch_size": 2}}}, STAGES)


def told(**changes: Any) -> list[str]:
    """Every problem of such a job."""
    try:
        job(**changes)
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({}, ""),
        ({"tuned": {"model": MODEL}}, "stages.tuned.model: give the numbers of a fresh model, or a start"),
        ({"tuned": {"instructions": None}}, "stages.tuned.tasks.0: answering learns from the questions"),
        ({"language": {"group": 3}}, "stages.language.group: 3 must divide global_batch 4 and be a multiple of batch_size 2"),
        ({"language": {"tasks": [{"kind": "captioning", "source": 1}]}}, "stages.language.tasks.0.source: is 1; tokens names 1"),
        ({"language": {"optimizers": {"lm": {"lr": 1}}}}, "stages.language.optimizers: they name lm; the model trains divot_lm"),
        ({"written": {"prompts": ["a"]}}, "stages.written.data: name either the clips"),
        ({"instructions": {"source": "x.jsonl"}}, "stages.instructions.scenes: name either scenes or a source"),
    ],
)
def test_what_cannot_work_is_refused_when_the_job_is_read(changes: dict[str, Any], start: str) -> None:
    found = told(**changes)
    assert len(found) == bool(start) and all(line.startswith(start) for line in found), json.dumps(found)


@pytest.mark.slow
def test_language_models_are_priced_before_they_run(store: Store) -> None:
    """What is trained and what adapters leave frozen, and memory that does not grow with the clips that nobody asks for."""
    found = {each.stage: each.cost for each in estimates(job())}
    made = {name: sum(weight.numel() for weight in open_language(store.find(name)).parameters()) for name in ("language", "tuned")}
    assert found["language"].trained == made["language"] and found["language"].frozen == 0
    assert 0 < found["tuned"].trained - found["tuned"].frozen < made["tuned"] < found["tuned"].trained + found["tuned"].frozen
    short = {each.stage: each.cost for each in estimates(job(language={"tasks": [{"kind": "captioning", "clips": 1}]}))}
    assert short["language"].activations < found["language"].activations and short["language"].flops < found["language"].flops


def test_captions_stand_for_the_clips(folder: Path) -> None:
    """The made-up shards tell captions as `encode` does."""
    assert TokenShards.open(found(folder, "tokens")).about(5)["caption"] == caption(5)
