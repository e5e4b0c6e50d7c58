"""kinetok: turn video into compact tokens, train the models around them, and know what made what.

The package spans four folders of the repository (`infra`, `tokenizers`, `llm`, `pipelines`); see docs/architecture.md.
The names below are loaded on first use, so that `import kinetok` stays free of torch and Ray.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["VideoLM", "load", "read_video"]

if TYPE_CHECKING:
    from kinetok.pipelines.data.decode import read_video as read_video
    from kinetok.pipelines.divot import VideoLM as VideoLM
    from kinetok.pipelines.models import load as load


def __getattr__(name: str) -> Any:
    if name == "VideoLM":
        from kinetok.pipelines.divot import VideoLM

        return VideoLM
    if name == "load":
        from kinetok.pipelines.models import load

        return load
    if name == "read_video":
        from kinetok.pipelines.data.decode import read_video

        return read_video
    raise AttributeError(f"module 'kinetok' has no attribute {name!r}")
