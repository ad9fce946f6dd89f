"""remask inside Ray applications. Importing it imports Ray.

Ray Data: `build_processor` and `Predictor`. Ray Serve: `build_app`, which is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

from remask.ray.predictor import Predictor
from remask.ray.processor import Processor, RemaskProcessorConfig, build_processor

if TYPE_CHECKING:
    from remask.ray.app import RemaskAppConfig, build_app

__all__ = [
    "Predictor",
    "Processor",
    "RemaskAppConfig",
    "RemaskProcessorConfig",
    "build_app",
    "build_processor",
]


def __getattr__(name: str) -> Any:
    if name not in ("RemaskAppConfig", "build_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from remask.ray import app

    return getattr(app, name)
