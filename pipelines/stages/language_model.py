"""`language_model`: a Divot-LLM that was trained elsewhere, brought into the store so that lineage begins with it.

Its folder is what `model/` of a `language` artifact is, or what `kinetok convert-language` makes of released files. Not covered: tokenizers
(`model.py`).
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from kinetok.infra.errors import StoreError
from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult
from kinetok.infra.storage import Folder

if TYPE_CHECKING:
    from kinetok.pipelines.data.language_feed import LanguageSpec

CHUNK = 64 << 20


class LanguageModel(Stage):
    """A copy of the model in `where`, in `model/`. Its identity is the content of its files, not where they lie."""

    kind: Literal["language_model"] = "language_model"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("where",)
    where: str
    """The folder."""
    tokens: Annotated[Ref, Produces("encode")]
    """Tokens of the tokenizer that it learned from: what it reads and writes."""
    instructed: bool = True
    """Whether it was tuned on instructions; what the folder says of it counts where it says so."""

    def literals(self) -> dict[str, Plain]:
        """How to ask it; the same files elsewhere are the same model."""
        return {"instructed": self.instructed}

    def facts(self) -> Mapping[str, Plain]:
        """Digest of every file but the card. Raises StoreError where there is no model."""
        from kinetok.tokenizers.card import CARD_FILE

        folder = Folder(self.where)
        if not folder.exists("config.json"):
            raise StoreError(
                f"{self.where} holds no config.json: name a folder that a `language` stage or `kinetok convert-language` wrote"
            )
        return {name: _digest(folder, name) for name in folder.files() if name != CARD_FILE}

    def run(self, ctx: StageContext) -> StageResult:
        """Copy the files. ContractError where the tokens are of another width, or another tokenizer's than the folder says."""
        from kinetok.llm.divot.model import DivotLMConfig
        from kinetok.pipelines.data.language_feed import LANGUAGE_FILE, LanguageSpec
        from kinetok.pipelines.data.token_shards import TokenShards
        from kinetok.pipelines.stages.language import require_fit, write_spec

        source, target = Folder(self.where), ctx.out / "model"
        spec = TokenShards.open(ctx.input("tokens")).spec
        require_fit(DivotLMConfig.model_validate_json(source.read_bytes("config.json")), spec, None)
        known = LanguageSpec.model_validate_json(source.read_bytes(LANGUAGE_FILE)) if source.exists(LANGUAGE_FILE) else None
        files = source.files()
        for done, name in enumerate(files):
            ctx.progress(done=done, total=len(files), unit="files")
            target.write_bytes(name, source.read_bytes(name))
        write_spec(ctx.out, _checked(known, spec) or LanguageSpec(tokens=spec, instructed=self.instructed))
        return StageResult()


def _checked(known: "LanguageSpec | None", spec: "object") -> "LanguageSpec | None":
    """What the folder says of itself, where that agrees with the tokens."""
    from kinetok.pipelines.data.language_feed import require_same_tokenizer
    from kinetok.tokenizers.base import TokenSpec

    assert isinstance(spec, TokenSpec)
    if known is not None:
        require_same_tokenizer("`tokens`", spec, known.tokens)
    return known


def _digest(folder: Folder, name: str) -> str:
    state = hashlib.sha256()
    with folder.open(name) as file:
        while data := file.read(CHUNK):
            state.update(data)
    return state.hexdigest()
