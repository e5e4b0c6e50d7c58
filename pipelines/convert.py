"""`convert`: Divot's released files as a model folder that every stage and command takes (`model: {kind: model, where: FOLDER}`).

Files are unpickled with `weights_only`, every tensor must fit, and a report says what was read and what was left aside. The language
model's files become a folder for `{kind: language_model, where: FOLDER}`, and with the tokenizer that they were released with, one that
`kinetok ask` and its like take as it is. Not covered: adapters that were not merged, writing the released format.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kinetok.infra.errors import ConfigError

if TYPE_CHECKING:
    from kinetok.llm.divot.model import DivotLMConfig
    from kinetok.tokenizers.base import TokenSpec
    from kinetok.tokenizers.divot.checkpoints import LoadReport


@dataclass(frozen=True)
class Converted:
    """What became of the files."""

    folder: Path
    parameters: int
    reports: "dict[Path, LoadReport]"
    note: str = "with the frozen models beside them"

    def lines(self) -> list[str]:
        """For people."""
        read = [
            f"{path.name}: {report.loaded} tensors read, none missing, none left over"
            + (f"; {len(report.ignored)} not needed ({report.ignored[0]}, ...)" if report.ignored else "")
            for path, report in self.reports.items()
        ]
        return [*read, f"{self.folder}: {self.parameters:,} trained parameters, {self.note}"]


def convert(tokenizer: Path, detokenizer: Path, out: Path, vit: str, ignored: tuple[str, ...] = ()) -> Converted:
    """Write the published model, on the vision transformer at `vit`, to `out`; ConfigError, naming what does not fit, before it writes.

    Tensors whose names begin with one of `ignored` are left aside.
    """
    from kinetok.tokenizers.divot.presets import FULL
    from kinetok.tokenizers.divot.released import open_released

    config = FULL.model_copy(update={"vit": FULL.vit.model_copy(update={"path": vit})})
    try:
        released = open_released(tokenizer, detokenizer, config, ignored=ignored)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{tokenizer} and {detokenizer} cannot be converted: {error}; --ignore PREFIX leaves aside what the model does without"
        ) from error
    released.model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in released.model.parameters())
    return Converted(out, parameters, {tokenizer: released.tokenizer, detokenizer: released.detokenizer})


def convert_language(agent: Path, language: Path, vocabulary: Path, out: Path, tokenizer: str | None, *, instructed: bool) -> Converted:
    """Write the published language model to `out`: the agent's file, the merged model's folder, its vocabulary's folder.

    `tokenizer` is what `kinetok.load` takes: whose tokens the model reads and writes. `language.json` then says so, and whether it was
    tuned on instructions; without it the folder is one for a job, which names the tokens. ConfigError, naming what does not fit, before
    anything is written.
    """
    from kinetok.llm.divot.official import open_official
    from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageSpec

    try:
        opened = open_official(agent, language, vocabulary)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{agent} and {language} cannot be converted: {error}") from error
    tokens = None if tokenizer is None else _spoken(tokenizer, opened.model.config)
    opened.model.save_pretrained(out)
    note = "for a job alone: --tokenizer makes it one that can be asked"
    if tokens is not None:
        assert tokens.recipe is not None, "`_spoken` gives one"
        # The released models learned pictures too, each as a clip of one frame.
        pictures = tokens.model_copy(update={"recipe": tokens.recipe.model_copy(update={"frames": 1})})
        spec = LanguageSpec(tokens=tokens, instructed=instructed, other=pictures)
        (out / LANGUAGE_FILE).write_text(spec.model_dump_json(indent=1), encoding="utf-8")
        note = f"which speak the tokens of {tokenizer}"
    parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    return Converted(out, parameters, {agent: opened.agent, language: opened.language}, note)


def _spoken(tokenizer: str, config: "DivotLMConfig") -> "TokenSpec":
    """The tokens of a tokenizer's windows at the published rate; ConfigError where a model of these numbers cannot take them."""
    from kinetok.pipelines.models import load
    from kinetok.tokenizers.base import DecodeRecipe
    from kinetok.tokenizers.divot.frames import RATE
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

    made = load(tokenizer)
    if not isinstance(made, DivotTokenizer):
        raise ConfigError(f"--tokenizer: {tokenizer} is a {made.config.kind!r} model; name a folder that `kinetok convert` wrote")
    own, wanted = (made.config.encoder.tokens, made.config.encoder.token_width), (config.clip_tokens, config.token_width)
    if own != wanted:
        raise ConfigError(
            f"--tokenizer: {tokenizer} makes {own[0]} tokens of {own[1]} numbers, the language model takes {wanted[0]} of {wanted[1]}"
        )
    recipe = DecodeRecipe(fps=RATE, frames=made.config.frames, height=made.config.edge, width=made.config.edge)
    return made.spec().model_copy(update={"recipe": recipe})
