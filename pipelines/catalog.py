"""`STAGES`: every stage a job file may name. Adding one is a file in `pipelines/stages/` and a line here (docs/adding-a-stage.md)."""

from kinetok.infra.stage import Stage
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.decode import Decode
from kinetok.pipelines.stages.diffusion import Diffusion
from kinetok.pipelines.stages.encode import Encode
from kinetok.pipelines.stages.evaluate import Evaluate
from kinetok.pipelines.stages.generate import Generate
from kinetok.pipelines.stages.ingest import Ingest
from kinetok.pipelines.stages.instructions import Instructions
from kinetok.pipelines.stages.judge import Judge
from kinetok.pipelines.stages.language import Language
from kinetok.pipelines.stages.language_model import LanguageModel
from kinetok.pipelines.stages.model import Model
from kinetok.pipelines.stages.reconstruct import Reconstruct
from kinetok.pipelines.stages.report import Report
from kinetok.pipelines.stages.scenes import Scenes
from kinetok.pipelines.stages.score import Score
from kinetok.pipelines.stages.text import Text
from kinetok.pipelines.stages.train import Train
from kinetok.pipelines.stages.understand import Understand
from kinetok.pipelines.stages.vit import Vit
from kinetok.pipelines.stages.write import Write

STAGES: tuple[type[Stage], ...] = (
    Scenes,
    Ingest,
    Model,
    Clips,
    Vit,
    Train,
    Encode,
    Text,
    Diffusion,
    Generate,
    Instructions,
    LanguageModel,
    Language,
    Write,
    Decode,
    Understand,
    Judge,
    Score,
    Evaluate,
    Reconstruct,
    Report,
)
