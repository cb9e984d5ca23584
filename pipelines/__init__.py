"""What to draw with, by the class of the denoiser."""

from .pixels import PixelPipeline
from .text2img import TextToImagePipeline
from .transformer import TransformerPipeline

PIPELINES = {
    "UNet2DConditionModel": TextToImagePipeline,
    "PixArtTransformer2DModel": TransformerPipeline,
    "UNet2DModel": PixelPipeline,
}
