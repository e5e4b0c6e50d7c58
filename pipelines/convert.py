"""`convert`: Divot's released files as a model folder that every stage and command takes (`model: {kind: model, where: FOLDER}`).

Files are unpickled with `weights_only`, every tensor must fit, and a report says what was read and what was left aside. The language
model's files become a folder for `{kind: language_model, where: FOLDER}`. Not covered: adapters that were not merged, writing the released
format.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kinetok.infra.errors import ConfigError

if TYPE_CHECKING:
    from kinetok.tokenizers.divot.checkpoints import LoadReport


@dataclass(frozen=True)
class Converted:
    """What became of the files."""

    folder: Path
    parameters: int
    reports: "dict[Path, LoadReport]"

    def lines(self) -> list[str]:
        """For people."""
        read = [
            f"{path.name}: {report.loaded} tensors read, none missing, none left over"
            + (f"; {len(report.ignored)} not needed ({report.ignored[0]}, ...)" if report.ignored else "")
            for path, report in self.reports.items()
        ]
        return [*read, f"{self.folder}: {self.parameters:,} trained parameters, with the frozen models beside them"]


def convert(tokenizer: Path, detokenizer: Path, out: Path, vit: str) -> Converted:
    """Write the published model, on the vision transformer at `vit`, to `out`; ConfigError, naming what does not fit, before it writes."""
    from kinetok.tokenizers.divot.presets import FULL
    from kinetok.tokenizers.divot.released import open_released

    config = FULL.model_copy(update={"vit": FULL.vit.model_copy(update={"path": vit})})
    try:
        released = open_released(tokenizer, detokenizer, config)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{tokenizer} and {detokenizer} cannot be converted: {error}") from error
    released.model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in released.model.parameters())
    return Converted(out, parameters, {tokenizer: released.tokenizer, detokenizer: released.detokenizer})


def convert_language(agent: Path, language: Path, vocabulary: Path, out: Path) -> Converted:
    """Write the published language model to `out`: the agent's file, the merged model's folder, its tokenizer's folder.

    ConfigError, naming what does not fit, before it writes.
    """
    from kinetok.llm.divot.official import open_official

    try:
        model, report = open_official(agent, language, vocabulary)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{agent} and {language} cannot be converted: {error}") from error
    model.save_pretrained(out)
    return Converted(out, sum(parameter.numel() for parameter in model.parameters()), {language: report})
