"""`language`: fit a Divot-LLM on cached tokens and text: pre-training, or where it starts from another one, instruction tuning.

What is learned is a mixture of tasks over one or several encodings of clips; no pixel is decoded. `model/language.json` says whose tokens
the model reads and writes. What adapters leave frozen is hashed before and after, but not under ZeRO-3, where no rank holds a whole
weight: that it stays as it was is not checked there. Not covered: the loop (`kinetok.infra.training`), the model and its losses
(`kinetok.llm.divot`), the samples (`data/language_tasks.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictInt

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import ContractError
from kinetok.infra.fingerprint import Plain, plain
from kinetok.infra.fit import FitConfig, fit, fit_problems
from kinetok.infra.stage import Ask, Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.infra.storage import Folder
from kinetok.llm.divot.language import PretrainedLanguage
from kinetok.llm.divot.model import DivotLMConfig
from kinetok.llm.divot.training import DivotLMObjective
from kinetok.pipelines.data.language_tasks import Answering, AnyTask, Storytelling, task_names

if TYPE_CHECKING:
    from kinetok.infra.training import Trainable
    from kinetok.llm.divot.vocabulary import Vocabulary
    from kinetok.pipelines.data.language_feed import LanguageFeed, LanguageSpec
    from kinetok.tokenizers.base import TokenSpec


class Language(Stage, FitConfig):
    """A trained Divot-LLM in `model/`, its metrics in `metrics/`, and `training.json`."""

    kind: Literal["language"] = "language"
    version: ClassVar[int] = 2
    uses_ray: ClassVar[bool] = True
    scales_with: ClassVar[tuple[str, ...]] = ("steps", "global_batch")
    tokens: Annotated[tuple[Ref, ...], Produces("encode"), Field(min_length=1)]
    """Tokens of one tokenizer, which tasks name by place. What their `val` split has for the tasks is evaluated, every sample once; nothing
    where it has nothing."""
    start: Annotated[Ref, Produces("language", "language_model")] | None = None
    """A trained model to go on from."""
    instructions: Annotated[Ref, Produces("instructions")] | None = None
    """Questions and stories, for the tasks that want them."""
    model: DivotLMConfig | None = None
    """Of a fresh model; None where there is a `start`."""
    objective: DivotLMObjective = Field(default_factory=DivotLMObjective)
    tasks: Annotated[tuple[AnyTask, ...], Field(min_length=1)]
    group: Annotated[StrictInt, Field(ge=1)] | None = None
    """Samples in a row of one task and about one length; None takes a whole step."""

    def fetch(self) -> None:
        """Download a language model that only the hub has."""
        from kinetok.pipelines.outside import fetch_model

        if self._pretrained is not None:
            fetch_model(self._pretrained)

    def facts(self) -> Mapping[str, Plain]:
        """Digests of the files of a language model by path or id. Raises StoreError where it is not here."""
        from kinetok.pipelines.outside import model_digests

        return {} if self._pretrained is None else {"language": plain(model_digests(self._pretrained))}

    @property
    def _pretrained(self) -> str | None:
        """Path or id of the language model that a fresh one begins with."""
        language = None if self.model is None else self.model.language
        return language.path if isinstance(language, PretrainedLanguage) else None

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """What would otherwise end the training when it starts, hours after the job did."""
        yield from fit_problems(self, resources, self.objective.players)
        if (self.model is None) == (self.start is None):
            yield "model: give the numbers of a fresh model, or a start to go on from, one of the two"
        group = self.group or self.global_batch
        if self.global_batch % group or group % resources.batch_size:
            yield f"group: {group} must divide global_batch {self.global_batch} and be a multiple of batch_size {resources.batch_size}"
        for number, task in enumerate(self.tasks):
            if task.source >= len(self.tokens):
                yield f"tasks.{number}.source: is {task.source}; tokens names {len(self.tokens)} encodings, the first of which is 0"
            if isinstance(task, Answering) and self.instructions is None:
                yield f"tasks.{number}: answering learns from the questions that `instructions` names"
            if isinstance(task, Storytelling) and task.reread and self.model is not None and self.model.mechanism == "autoregressive":
                yield f"tasks.{number}.reread: an autoregressive model reads every token it makes; leave it out"
        for name in self.tokens:
            if getattr(stages[name], "content", "tokens") != "tokens":
                yield f"tokens: {name} does not hold tokens; name an encoding with content: tokens"

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        return (Ask("training worker", resources.worker, resources.workers),)

    def run(self, ctx: StageContext) -> StageResult:
        """Train, or continue where an earlier attempt was killed."""
        from kinetok.llm.card import belongs
        from kinetok.llm.divot.training import RAW
        from kinetok.pipelines.data.language_feed import LanguageFeed
        from kinetok.pipelines.trained_card import complete_card

        start, tokens = ctx.optional("start"), ctx.several("tokens")
        config = self.model or model_config(start)
        feed = partial(
            LanguageFeed,
            tokens,
            ctx.optional("instructions"),
            self.tasks,
            open_vocabulary=partial(open_vocabulary, self.model, start),
            clip_tokens=config.clip_tokens,
            group=self.group or self.global_batch,
            seed=self.seed,
            loaders=ctx.resources.loaders,
        )
        unknown = unknown_to(self.tasks, tokens, ctx.optional("instructions"))
        train, validation = feed(split="train"), feed(split="val")
        require_fit(config, train.spec, start)
        if notes := list(_notes(unknown, validation)):
            ctx.progress(note="; ".join(notes))
        numbers = FitConfig.model_validate(self.model_dump(include=set(FitConfig.model_fields)))
        metrics = fit(
            partial(build_trainable, self.model, start, self.objective, ctx.resources, task_names(self.tasks)),
            train,
            validation if len(validation) else None,
            numbers,
            out=ctx.out,
            resources=ctx.resources,
            progress=ctx.progress,
            stop=ctx.stop,
        )
        spec = self._spec(train.specs, start)
        write_spec(ctx.out, spec)
        told = {name: value for name, value in metrics.items() if name.rpartition("/")[2] not in RAW}
        complete_card(ctx, numbers, spec.recipe, told, belongs(spec.tokens))
        return StageResult(metrics | unknown | {"validation_samples": float(len(validation))})

    def _spec(self, tokens: "Sequence[TokenSpec]", start: Artifact | None) -> "LanguageSpec":
        """How the model wants to be asked: what these tasks taught it, and what it knew before."""
        from kinetok.pipelines.data.language_feed import LanguageSpec
        from kinetok.pipelines.data.token_videos import media_of
        from kinetok.pipelines.models import language_spec

        before = None if start is None else language_spec(start)
        stories = [task for task in self.tasks if isinstance(task, Storytelling)]
        others = [spec for spec in tokens if media_of(spec) != media_of(tokens[0])]
        if before is not None:
            others += [spec for spec in (before.tokens, before.other) if spec is not None and media_of(spec) != media_of(tokens[0])]
        return LanguageSpec(
            tokens=tokens[0],
            instructed=self.instructed or (before is not None and before.instructed),
            other=others[0] if others else None,
            rereads=any(task.reread for task in stories) if stories or before is None else before.rereads,
        )

    @property
    def instructed(self) -> bool:
        """Whether any task asks in the form of an instruction."""
        return any(isinstance(task, Answering | Storytelling) or task.instructed for task in self.tasks)


def _notes(lost: Mapping[str, float], validation: "LanguageFeed") -> Iterator[str]:
    """What is to be known before a training: questions and stories that are not learned, tasks that are not validated."""
    if told := [f"{count:g} {name.replace('_', ' ')}" for name, count in lost.items() if count]:
        yield f"not learned, for the clips they are of: {', '.join(told)}"
    if validation.lacking:
        yield f"not validated, for the val split has nothing of it: {', '.join(validation.lacking)}"


def unknown_to(tasks: Sequence[AnyTask], tokens: Sequence[Artifact], instructions: Artifact | None) -> dict[str, float]:
    """How many questions and stories that `tasks` learn from are about videos that their tokens lack (`unknown_lines`), and how many
    stories are of videos of both splits, which are left out (`divided_stories`).

    ContractError where all are unknown: their file calls the videos otherwise.
    """
    import pyarrow as pa

    from kinetok.pipelines.data.instructions import QUESTIONS, STORIES, Questions, Story, read_lines
    from kinetok.pipelines.data.token_shards import TokenShards
    from kinetok.pipelines.data.token_videos import divided_stories, unknown_lines

    if instructions is None:
        return {}
    found: dict[str, float] = {}
    for kind, name in ((Answering, "unknown_questions"), (Storytelling, "unknown_stories")):
        sources = sorted({task.source for task in tasks if isinstance(task, kind)})
        if not sources:
            continue
        rows = pa.concat_tables([TokenShards.open(tokens[source]).rows.select(["id", "split"]) for source in sources])
        questions = read_lines(instructions, QUESTIONS, Questions) if kind is Answering else []
        stories = read_lines(instructions, STORIES, Story) if kind is Storytelling else []
        holder = ", ".join(tokens[source].name for source in sources)
        found[name] = unknown_lines(questions, stories, rows["id"], asker=instructions.name, holder=holder)[name]
        if stories:
            found["divided_stories"] = float(divided_stories(stories, rows["id"], rows["split"]))
    return found


def write_spec(out: Folder, spec: "LanguageSpec") -> None:
    """Put `language.json` beside a model's weights, so that its folder is whole by itself."""
    from kinetok.pipelines.data.language_feed import LANGUAGE_FILE

    (out / "model").write_text(LANGUAGE_FILE, spec.model_dump_json(indent=1))


def model_config(start: Artifact | None) -> DivotLMConfig:
    """That of a trained model."""
    from kinetok.tokenizers.base import CONFIG_FILE

    assert start is not None, "problems() asks for a model or a start"
    return DivotLMConfig.model_validate_json((start.folder / "model").read_bytes(CONFIG_FILE))


def require_fit(config: DivotLMConfig, spec: "TokenSpec", start: Artifact | None) -> None:
    """Raise ContractError where a model of these numbers cannot take the tokens, or its `start` learned another tokenizer's."""
    from kinetok.pipelines.data.language_feed import require_same_tokenizer
    from kinetok.pipelines.models import language_spec

    if config.token_width != spec.channels:
        raise ContractError(
            f"the model reads tokens of {config.token_width} numbers, the data have {spec.channels}: set token_width of the model"
        )
    if start is not None:
        require_same_tokenizer("`tokens`", spec, language_spec(start).tokens)


def open_vocabulary(model: DivotLMConfig | None, start: Artifact | None) -> "Vocabulary":
    """The vocabulary of the model to train, without its weights."""
    from kinetok.llm.divot.language import read_vocabulary
    from kinetok.llm.divot.model import LANGUAGE
    from kinetok.llm.divot.vocabulary import Vocabulary
    from kinetok.pipelines.models import on_disk

    if model is not None:
        return read_vocabulary(model.language)
    assert start is not None, "problems() asks for a model or a start"
    with on_disk(start.folder / "model" / LANGUAGE, skip=("*.safetensors",)) as folder:
        return Vocabulary.from_pretrained(folder)


def build_trainable(
    model: DivotLMConfig | None, start: Artifact | None, objective: DivotLMObjective, resources: Resources, tasks: tuple[str, ...]
) -> "Trainable":
    """A fresh model, or the one to go on from, as the training loop takes it; called in every worker.

    What it leaves frozen is watched, but not under ZeRO-3 (see the module).
    """
    from kinetok.llm.divot.model import DivotLM
    from kinetok.llm.divot.training import DivotLMTrainable
    from kinetok.pipelines.models import open_language

    if start is not None:
        made = open_language(start)
    else:
        assert model is not None, "problems() asks for a model or a start"
        made = DivotLM.build(model)
    return DivotLMTrainable(made, objective, tasks=tasks, checkpointing=resources.recompute, watched=resources.zero < 3)
