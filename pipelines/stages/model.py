"""`model`: a tokenizer that was trained elsewhere, by kinetok or by others, brought into the store so that lineage begins with it."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

from kinetok.infra.errors import StoreError
from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Stage, StageContext, StageResult


class Model(Stage):
    """A copy of the tokenizer at `where` in `model/`. Its identity is the weights, not the address they came from."""

    kind: Literal["model"] = "model"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("where",)
    where: str
    """What `kinetok.load` takes: a folder (of an artifact, or of diffusers), `models:/name@alias`, the name of an artifact, or an
    `owner/name` of the Hugging Face hub.

    Names are looked up in $KINETOK_STORE, else `./work`, also where the job has another store: name the folder then.
    """

    def literals(self) -> dict[str, Plain]:
        """Nothing: the same weights elsewhere are the same model."""
        return {}

    def fetch(self) -> None:
        """Download what only the hub has. Raises StoreError where it has no such model."""
        from kinetok.pipelines.models import fetch

        fetch(self.where)

    def facts(self) -> Mapping[str, Plain]:
        """Config and identity of what is at `where` now. Raises StoreError where there is no model, or it was not downloaded yet."""
        from kinetok.pipelines.models import load

        model = load(self.where, download=False)
        return {"config": model.config.model_dump(mode="json"), "weights": model.identity()}

    def run(self, ctx: StageContext) -> StageResult:
        """Copy the model. Raises StoreError where it is not the one that was planned with."""
        from kinetok.pipelines.models import load

        model = load(self.where)
        with TemporaryDirectory(prefix="kinetok-") as copy:
            model.save_pretrained(copy)
            for path in [path for path in Path(copy).rglob("*") if path.is_file()]:
                ctx.out.put_file(path, f"model/{path.relative_to(copy)}")
        if self.key({}) != ctx.key:
            raise StoreError(f"{self.where} became another model while this run was under way; run again to take that one")
        return StageResult({"parameters": float(sum(parameter.numel() for parameter in model.parameters()))})
