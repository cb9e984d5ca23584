"""The pipelines that are saved with a model, by their names."""

from .decoder import DecoderPipeline
from .imagen import ImagenPipeline
from .kandinsky import KandinskyPipeline
from .latent_decoder import LatentDecoderPipeline
from .pixels import PixelPipeline
from .prior import PriorPipeline
from .prompted_pixels import PromptedPixelPipeline
from .super_resolution import SuperResolutionPipeline
from .text2img import TextToImagePipeline
from .transformer import TransformerPipeline
from .unclip import UnCLIPPipeline
from .upsampler import UpsamplerPipeline
from .video import VideoPipeline

PIPELINES = {
    kind.__name__: kind
    for kind in (
        TextToImagePipeline,
        TransformerPipeline,
        PixelPipeline,
        PriorPipeline,
        DecoderPipeline,
        UpsamplerPipeline,
        UnCLIPPipeline,
        PromptedPixelPipeline,
        SuperResolutionPipeline,
        ImagenPipeline,
        LatentDecoderPipeline,
        KandinskyPipeline,
        VideoPipeline,
    )
}
