"""`STAGES`: every stage a job file may name. Adding one is a file in `pipelines/stages/` and a line here (docs/adding-a-stage.md)."""

from kinetok.infra.stage import Stage

STAGES: tuple[type[Stage], ...] = ()
