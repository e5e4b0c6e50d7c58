"""`STAGES`: every stage a job file may name. Adding one is a file in `pipelines/stages/` and a line here (docs/adding-a-stage.md)."""

from kinetok.infra.stage import Stage
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.diffusion import Diffusion
from kinetok.pipelines.stages.encode import Encode
from kinetok.pipelines.stages.evaluate import Evaluate
from kinetok.pipelines.stages.generate import Generate
from kinetok.pipelines.stages.ingest import Ingest
from kinetok.pipelines.stages.model import Model
from kinetok.pipelines.stages.report import Report
from kinetok.pipelines.stages.scenes import Scenes
from kinetok.pipelines.stages.text import Text
from kinetok.pipelines.stages.train import Train

STAGES: tuple[type[Stage], ...] = (
    Scenes,
    Ingest,
    Model,
    Clips,
    Train,
    Encode,
    Text,
    Diffusion,
    Generate,
    Evaluate,
    Report,
)
