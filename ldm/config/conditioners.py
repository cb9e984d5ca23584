"""The conditioning of the denoiser: a frozen dataclass for each conditioner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

TextOutput = Literal["prompt_embeds", "pooled_prompt_embeds", "attention_mask"]
Network = dict[str, Any]
"""A network by diffusers' or transformers' own config keys, ``_class_name`` included."""


@dataclass(frozen=True)
class TextConfig:
    """Prompt embeddings for cross-attention."""

    pretrained: str | None = None
    """Folder, Hub name or ``package:NAME/FOLDER``, of an encoder or a pipeline; None: from scratch."""
    encoder: Network = field(default_factory=dict)
    """CLIPTextModel's config keys, from scratch; the vocabulary comes from the tokenizer."""
    vocab_size: int = 2048
    """Size of the BPE vocabulary that is learned from the training captions, from scratch."""
    max_length: int = 24
    """Tokens that a caption is padded or cut to, begin and end tokens included."""
    train: bool = True
    """Train the encoder with the denoiser; False: frozen, and its embeddings are cached."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of a frozen encoder's weights: bfloat16 halves the memory of a large T5, whose numbers float16 cannot hold.
    None: as they are saved, float32 in place of float16."""
    dropout: float = 0.1
    """Share of captions that are replaced by ""; guidance needs it."""
    keywords: dict[str, TextOutput] = field(default_factory=lambda: {"encoder_hidden_states": "prompt_embeds"})
    """Output of the encoder for each keyword argument of the denoiser; ``added_cond_kwargs.NAME`` is an entry of it."""


UNKNOWN_CLASS = -1
"""Class label of an image whose class is unknown; it trains as if its class were dropped."""


@dataclass(frozen=True)
class LabelConfig:
    """Classes, by number."""

    num_classes: int
    """Number of classes. The denoiser needs ``num_class_embeds`` one higher, for the null class (DiT:
    ``num_embeds_ada_norm``, this number)."""
    dropout: float = 0.1


@dataclass(frozen=True)
class ImageConfig:
    """The embedding of the image itself; at sampling a prior predicts it."""

    pretrained: str
    """Folder or Hub name of a CLIP vision model with projection, or of a pipeline with it."""
    null: Literal["zeros", "zero_picture"] = "zeros"
    """Embedding in place of dropped ones: zeros (DALL-E 2), or that of an image of zeros (Kandinsky 2.2)."""
    dropout: float = 0.1


@dataclass(frozen=True)
class LowResConfig:
    """The image itself at a lower resolution, as three more input channels: for super-resolution in a cascade."""

    image_size: int
    """Pixels, height and width, of the small image."""
    blur: float = 0.0
    """Largest standard deviation, in pixels of the small image, of a Gaussian blur of it; each sample has its own, from
    0 on. 0: no blur. In samples there is none."""
    noise_timesteps: int = 0
    """Noise is added to it, up to this step of 1000 of the cosine path; ``class_labels`` is the step. 0: no noise."""


@dataclass(frozen=True)
class FramesConfig:
    """Frames of each clip that are given, as C more input channels, and one more that marks them."""

    max_context: int = 1
    """Largest number of first frames that are given, to go on from them; 0: none."""
    between: float = 0.0
    """Share of the clips of which the first and the last frame are given in their place, to fill in what is between."""
    dropout: float = 0.1


@dataclass(frozen=True)
class ConditionersConfig:
    """The conditioning of the denoiser, besides the noisy latents and the timestep."""

    text: TextConfig | None = None
    label: LabelConfig | None = None
    image: ImageConfig | None = None
    low_res: LowResConfig | None = None
    frames: FramesConfig | None = None
