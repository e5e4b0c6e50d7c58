"""`ingest`: list a source, or take the videos that an earlier stage made, as numbered shards. Nothing is copied."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import model_validator

from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult


class Ingest(Stage):
    """Exactly one of `source` and `made_by` is set; `csv` goes with a folder."""

    kind: Literal["ingest"] = "ingest"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("source", "csv")
    source: str | None = None
    """Tars (`s3://b/{000000..000099}.tar`, `data/*.tar`, one tar) or a folder of videos or tars."""
    made_by: Annotated[Ref, Produces("scenes")] | None = None
    """A stage whose tars are the source."""
    csv: str | None = None
    """WebVid's columns: videoid, contentUrl, duration, page_dir, name; also group and split. Only its rows count then."""
    split_csv: str | None = None
    """Columns videoid, split."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.source is None) == (self.made_by is None):
            raise ValueError("set exactly one of source and made_by")
        if self.csv is not None and self.source is None:
            raise ValueError("csv goes with source")
        if self.split_csv is not None and self.csv is None:
            raise ValueError("split_csv goes with csv")
        return self

    def facts(self) -> Mapping[str, Plain]:
        """Digest of what the source holds now. Raises DataError where there is nothing, or a table is not there."""
        from kinetok.infra.errors import DataError
        from kinetok.pipelines.data.sources import list_source, version_of

        if self.source is None:
            return {}
        listing = list_source(self.source).digest
        try:
            tables = [version_of(url) for url in (self.csv, self.split_csv) if url]
        except FileNotFoundError as error:
            raise DataError(
                f"{error.filename or error} is not there: csv and split_csv name tables beside the source {self.source}"
            ) from error
        return {"listing": listing, "tables": [f"{size} {version}" for size, version in tables]}

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.infra.errors import DataError
        from kinetok.pipelines.data.sources import list_source, read_csv, write_plan

        source = self.source or f"{ctx.input('made_by').folder}/shards/*.tar"
        listing = list_source(source)
        if self.csv is not None and listing.kind == "tar":
            raise DataError(
                f"{self.csv}: a CSV goes with a folder of videos, {source} is tars; `kinetok pack --csv` puts captions into tars"
            )
        rows = read_csv(self.csv, self.split_csv) if self.csv is not None else None
        shards = write_plan(ctx.out, listing, rows)
        if self.source is not None and self.key({}) != ctx.key:
            raise DataError(f"{source} changed while this run was under way; run again to list it anew")
        ctx.progress(done=shards, total=shards, unit="shards")
        total = sum(file.bytes for file in listing.files)
        return StageResult({"shards": float(shards), "files": float(len(listing.files)), "bytes": float(total)})
