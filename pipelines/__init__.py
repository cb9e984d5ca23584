"""The pipelines that are saved with a model, by their names."""

from .pixels import PixelPipeline
from .text2img import TextToImagePipeline
from .transformer import TransformerPipeline

PIPELINES = {kind.__name__: kind for kind in (TextToImagePipeline, TransformerPipeline, PixelPipeline)}
