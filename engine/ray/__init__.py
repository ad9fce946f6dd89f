"""remask inside Ray applications. Importing it imports Ray.

Ray Data: `build_processor` and `Predictor`.
"""

from remask.ray.predictor import Predictor
from remask.ray.processor import Processor, RemaskProcessorConfig, build_processor

__all__ = ["Predictor", "Processor", "RemaskProcessorConfig", "build_processor"]
