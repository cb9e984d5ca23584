"""The checks of a config: ranges of its numbers, its texts and paths, and contradictions between its fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from PIL import ImageColor

from ldm.config import (
    AutoencoderConfig,
    ClipConfig,
    ClipNetworkConfig,
    ContrastiveConfig,
    DataConfig,
    DoctorConfig,
    LoopConfig,
    ObjectiveConfig,
    OptimConfig,
    ReconstructionConfig,
    RunConfig,
    SamplerConfig,
    SpaceConfig,
    StageConfig,
    SystemConfig,
    TemporalConfig,
    TemporalDecoderConfig,
    ValidationConfig,
)
from ldm.config.conditioners import ConditionersConfig, FramesConfig, ImageConfig, LabelConfig, LowResConfig, TextConfig
from ldm.config.places import PLAIN_NAME
from ldm.config.schema import CLIPS
from ldm.errors import ConfigError

C = TypeVar("C")


@dataclass(frozen=True)
class Numbers:
    """A range of numbers from `low` to `high`, without `low` if `above`, without `high` if `below`; never NaN."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Return True if `value` is in the range."""
        return self.low <= value <= self.high and not (
            (self.above and value == self.low) or (self.below and value == self.high)
        )

    def __str__(self) -> str:
        """Return the range in words."""
        if (self.low, self.high) == (-math.inf, math.inf):
            return "a finite number"
        if self.high == math.inf:
            kind = "a finite number" if self.below else "a number"
            return f"{kind} above {self.low:g}" if self.above else f"{kind}, {self.low:g} or more"
        high = f"below {self.high:g}" if self.below else f"{self.high:.10g}"
        return f"a number above {self.low:g}, to {high}" if self.above else f"a number from {self.low:g} to {high}"


FINITE = Numbers(-math.inf, math.inf, above=True, below=True)
POSITIVE = Numbers(0, math.inf, above=True, below=True)
WEIGHT = Numbers(0, math.inf, below=True)
SHARE = Numbers(0, 1, below=True)
COUNT = Numbers(1, 2**31 - 1)
COUNT_OR_NONE = Numbers(0, 2**31 - 1)
PIXELS = Numbers(1, 8192)
SEED = Numbers(-(2**62), 2**62)
NOISE_LEVEL = 100
"""Level of the noise on the small image that a super-resolution is sampled with, where a call names none."""
RANGES: dict[type[Any], dict[str, Numbers]] = {
    DataConfig: {
        "image_size": PIXELS,
        "crop_size": PIXELS,
        "num_frames": Numbers(2, 2**16),
        "video_frames": Numbers(2, 2**16),
        "frame_rate": Numbers(0, 1000, above=True),
        "stride": Numbers(1, 2**16),
        "limit": COUNT,
        "held_out_percent": Numbers(0, 50, below=True),  # the same percentage is for test
        "batch_size": Numbers(1, 2**20),
        "workers": Numbers(0, 1024),
        "timeout_seconds": Numbers(1, 1e7),
    },
    SpaceConfig: {"image_size": PIXELS},
    # 514: two entries for every byte, begin and end; 3: begin, end and a token between them
    TextConfig: {"vocab_size": Numbers(514, 2**20), "max_length": Numbers(3, 2**16), "dropout": SHARE},
    LabelConfig: {"num_classes": COUNT, "dropout": SHARE},
    ImageConfig: {"dropout": SHARE},
    LowResConfig: {"image_size": PIXELS, "blur": Numbers(0, 100), "noise_timesteps": Numbers(0, 1000)},
    FramesConfig: {"max_context": COUNT_OR_NONE, "between": Numbers(0, 1), "dropout": SHARE},
    TemporalConfig: {"head_dim": Numbers(1, 4096)},
    TemporalDecoderConfig: {},
    ConditionersConfig: {},
    ObjectiveConfig: {
        "num_train_timesteps": Numbers(1, 10**6),
        "logit_mean": FINITE,
        "logit_std": POSITIVE,
        "min_snr_gamma": POSITIVE,
        "variational_weight": POSITIVE,
    },
    SamplerConfig: {"thresholding": Numbers(0, 1, above=True)},
    ReconstructionConfig: {
        "l1_weight": WEIGHT,
        "l2_weight": WEIGHT,
        "kl_weight": WEIGHT,
        "codebook_weight": WEIGHT,
        "codebook_share": Numbers(0, 1),
        "revive_after_steps": COUNT,
        "perceptual_weight": WEIGHT,
        "adversarial_weight": WEIGHT,
        "change_weight": WEIGHT,
        "discriminator_start_step": COUNT_OR_NONE,
        "discriminator_channels": Numbers(4, 1024),
        "discriminator_layers": Numbers(1, 10),
    },
    OptimConfig: {
        "learning_rate": POSITIVE,
        "betas": SHARE,
        "eps": Numbers(1e-37, math.inf, below=True),  # less is 0 in float32, and the first update would be 0 / 0
        "weight_decay": WEIGHT,
        "max_grad_norm": Numbers(0, math.inf, above=True),  # infinity: gradients are not clipped
        "warmup_steps": COUNT_OR_NONE,
        "decay_fraction": Numbers(0, 1, above=True),
        "final_fraction": Numbers(0, 1),
        "ema_decay": SHARE,
    },
    LoopConfig: {
        "max_train_steps": COUNT,
        "max_train_epochs": Numbers(0, 1e9, above=True),
        "max_train_seconds": Numbers(0, 1e9, above=True),
        "gradient_accumulation_steps": COUNT,
        "log_every_steps": COUNT,
        "save_every_steps": COUNT,
        "keep_checkpoints": COUNT,
        "process_timeout_seconds": Numbers(1, 1e7),
        "validate_every_steps": COUNT,
    },
    ValidationConfig: {
        "num_images": COUNT,
        "num_inference_steps": COUNT,
        "guidance_scale": Numbers(0, 1e6),
        "loss_images": COUNT,
        "retrieval_images": COUNT_OR_NONE,
    },
    DoctorConfig: {"price_per_hour": WEIGHT, "gpu_tflops": POSITIVE, "gpu_memory_gib": POSITIVE},
    RunConfig: {"seed": SEED, "push_every_steps": COUNT},
    StageConfig: {
        "snapshot_every_steps": COUNT,
        "snapshot_sigma_rels": Numbers(0, 0.28, above=True),  # the average over all steps alike has 0.2887
    },
    AutoencoderConfig: {},
    ClipNetworkConfig: {
        "projection_dim": COUNT,
        "vocab_size": Numbers(514, 2**20),
        "max_length": Numbers(3, 2**16),
    },
    ContrastiveConfig: {"max_logit_scale": POSITIVE, "smallest_crop": Numbers(0, 1, above=True)},
    ClipConfig: {},
}
"""The range of each number of a config, by class; a subclass adds to its base, or narrows it.

For a tuple, each entry must be in the range.
"""

LIMITS = ("max_train_steps", "max_train_epochs", "max_train_seconds")
"""Fields of the loop that can end a training: one is set."""
FILES = ("output_dir", "path", "held_out", "stages", "autoencoder", "image_encoder", "pretrained", "lpips_weights")
"""Fields that name files."""
NAMES = ("_class_name", "pretrained", "revision", "subfolder")
"""Keys of a network's config that are not arguments of its class."""
MAX_LAYERS = 1000
MAX_DEPTH = 4
"""Deepest nesting of lists in a value of a network's config."""


def faults(config: Any, path: str = "") -> Iterator[str]:
    """Yield a line ``path: fault`` for each unusable value of a config.

    Faults that show only when the parts are built or tried are found there, before training: see `explained`.
    """
    ranges = ranges_of(type(config))
    networks = network_fields(type(config))
    for field in fields(config):
        value, at = getattr(config, field.name), f"{path}.{field.name}" if path else field.name
        if value is None:
            continue
        if is_dataclass(value):
            yield from faults(value, at)
        elif field.name in networks:
            yield from _network_faults(value, at)
        elif any(base in RANGES for base in type(config).__mro__):
            allowed = ranges.get(field.name)
            for entry in value if isinstance(value, tuple) else [value]:
                if allowed is not None and entry not in allowed:
                    yield f"{at}: got {shown(value)}; expected {allowed}"
                    break
            yield from _text_faults(value, at, field.name in FILES)
    for kind in type(config).__mro__:
        if kind in CONTRADICTIONS:
            yield from CONTRADICTIONS[kind](config, path)


def ranges_of(kind: type[Any]) -> dict[str, Numbers]:
    """Return the range of each number of a dataclass, base classes included."""
    return {name: allowed for base in reversed(kind.__mro__) for name, allowed in RANGES.get(base, {}).items()}


def network_fields(kind: type[Any]) -> set[str]:
    """Return the names of a dataclass's fields whose annotation is the word `Network`."""
    return {field.name for field in fields(kind) if field.type == "Network"}


def field_hints(kind: type[Any]) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass, by name, in the fields' order."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def checked(config: C, path: str = "") -> C:
    """Return the config; ConfigError, with all `faults`, if it has any."""
    if problems := list(faults(config, path)):
        raise ConfigError("\n".join(problems))
    return config


def _data_contradictions(config: DataConfig, path: str) -> Iterator[str]:
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        colour = shown(config.background)
        yield f"{path}.background: got {colour}; expected a colour that PIL knows, such as white or #ffffff"
    if config.crop_size is not None and config.crop_size > config.image_size:
        yield f"{path}.crop_size: got {config.crop_size}; expected at most image_size, {config.image_size}"
    clips = config.source == "openmoji_clips"
    if config.items == "frames" and config.source not in CLIPS:
        yield f"{path}.items: got frames of data.source {config.source}, whose items are images; expected all"
    if clips and config.languages != ("en",):
        yield f"{path}.languages: got {', '.join(config.languages)}; expected en: the words of motions are English"
    if clips and config.flip:
        yield f"{path}.flip: got true; expected false: captions of openmoji_clips say left and right"
    films = config.source == "videofolder"
    if config.stride is not None and not films and config.video_frames is None:
        yield f"{path}.stride: got {config.stride} and no videos to cut; expected null, or {path}.video_frames"
    if config.video_frames is not None and not clips:
        yield f"{path}.video_frames: got {config.video_frames} of data.source {config.source}; expected null"
    if config.video_frames is not None and config.video_frames < config.num_frames:
        yield f"{path}.video_frames: got {config.video_frames}; expected num_frames, {config.num_frames}, or more"
    if not films and (config.frame_rate is not None or config.short_films != "error"):
        yield f"{path}.frame_rate, short_films: got settings for data.source {config.source}; they are of videofolder"
    if films and config.class_column is not None:
        yield f"{path}.class_column: got {config.class_column} of data.source videofolder; expected null"
    if config.groups and config.source not in ("openmoji", "openmoji_clips"):
        yield f"{path}.groups: got groups of data.source {config.source}; expected none: they are openmoji's"


def _text_contradictions(config: TextConfig, path: str) -> Iterator[str]:
    if config.dtype is not None and (config.train or config.pretrained is None):
        yield f"{path}.dtype: got {config.dtype}; expected null, or a pretrained encoder with train false"


def _run_contradictions(config: RunConfig, path: str) -> Iterator[str]:
    optim, loop = config.optim, config.loop
    given = [name for name in LIMITS if getattr(loop, name) is not None]
    if len(given) > 1:
        got = " and ".join(f"{name} {getattr(loop, name):g}" for name in given)
        yield f"loop: got {got}; expected one of them, and null for the others"
    if config.push_to_hub is None and (config.push_private or config.push_every_steps is not None):
        yield "push_to_hub: got null; expected the repository for push_private and push_every_steps, or leave them out"
    yield from _indivisible(config, "loop.gradient_accumulation_steps", loop.gradient_accumulation_steps)
    if optim.decay != "constant" and 0 < (loop.max_train_steps or math.inf) <= optim.warmup_steps:
        yield (
            f"optim.warmup_steps: got {optim.warmup_steps} of loop.max_train_steps {loop.max_train_steps}, which "
            f"leaves none for optim.decay {optim.decay}; expected fewer, or optim.decay: constant"
        )


def _stage_contradictions(config: StageConfig, path: str) -> Iterator[str]:
    space, crop, size = config.space, config.data.crop_size, config.data.image_size
    if space.image_size is not None and (space.kind != "pixel" or space.image_size > size):
        yield (
            f"space.image_size: got {space.image_size} in space.kind {space.kind}; expected null, or in space.kind "
            f"pixel at most data.image_size, {size}"
        )
    told = config.conditioners
    if told.low_res is not None and told.text is not None and 0 < told.low_res.noise_timesteps <= NOISE_LEVEL:
        yield (
            f"conditioners.low_res.noise_timesteps: got {told.low_res.noise_timesteps}; expected 0, or more than "
            f"{NOISE_LEVEL}, the level of a pipeline's call that names none"
        )
    # beside the small image of the crop, a caption or a class only says what it is of
    whole = told.image or (told.low_res is None and (told.text or told.label))
    if crop is not None and (space.kind != "pixel" or space.image_size is not None or whole):
        yield (
            f"data.crop_size: got {crop}; expected null, but for a stage in space.kind pixel without space.image_size "
            "whose conditioners say nothing of whole images, or low_res beside captions or classes"
        )
    small = config.conditioners.low_res
    if small is not None and space.image_size is not None:
        yield "space.image_size: got a size beside conditioners.low_res; expected null: set data.image_size to it"
    if small is not None and crop is not None and crop * small.image_size % size:
        yield (
            f"data.crop_size: got {crop}, whose share of data.image_size {size} is no whole number of the "
            f"{small.image_size} pixels of conditioners.low_res.image_size"
        )
    yield from _clip_stage_contradictions(config)
    most, steps = config.objective.num_train_timesteps, config.validation.num_inference_steps
    if steps > most:
        yield f"validation.num_inference_steps: got {steps}; expected at most objective.num_train_timesteps, {most}"
    if config.objective.path == "flow" and config.sampler.kind != "dpm_solver":
        yield f"sampler.kind: got {config.sampler.kind}, which knows no objective.path flow; expected dpm_solver"
    if steps < 2 and config.sampler.kind in ("ddpm", "unclip"):
        yield f"validation.num_inference_steps: got {steps}; expected 2 or more for sampler.kind {config.sampler.kind}"
    objective = config.objective
    known = (objective.path, objective.prediction_type, objective.zero_terminal_snr) == ("cosine", "sample", False)
    if config.sampler.kind == "unclip" and not known:
        yield (
            "sampler.kind: got unclip, which samples objective.path cosine with prediction_type sample, without "
            "zero_terminal_snr; expected these, or dpm_solver"
        )
    if config.sampler.kind == "unclip" and config.sampler.thresholding is not None:
        yield "sampler.thresholding: got a number with sampler.kind unclip, which knows none; expected null"
    learned = config.objective.variational_weight is not None
    if config.sampler.variance_type != "fixed_small" and (config.sampler.kind != "ddpm" or learned):
        yield (
            f"sampler.variance_type: got {config.sampler.variance_type}, which only sampler.kind ddpm without "
            "objective.variational_weight takes; expected fixed_small, the default"
        )
    if config.validation.retrieval_images and config.conditioners.text is None:
        yield (
            f"validation.retrieval_images: got {config.validation.retrieval_images} without conditioners.text; "
            "expected 0: there is no caption to sample an image of"
        )
    if config.snapshot_every_steps is not None and not config.snapshot_sigma_rels:
        yield "snapshot_sigma_rels: got none; expected one or more for snapshot_every_steps, usually [0.05, 0.1]"


def _clip_stage_contradictions(config: StageConfig) -> Iterator[str]:
    frames, data = config.conditioners.frames, config.data
    if data.clips and config.temporal is None:
        yield "temporal: got null for clips; expected settings of temporal layers, {} at least, or data.items: frames"
    if config.temporal is not None and not data.clips:
        yield f"temporal: got settings for data.source {data.source} of images; expected null, or data of clips"
    elif config.temporal is not None and config.temporal.freeze_image_layers and "pretrained" not in config.denoiser:
        yield (
            "temporal.freeze_image_layers: got true for a denoiser from scratch, whose last layer would stay zero; "
            "expected false, or an image model as denoiser.pretrained"
        )
    if data.items == "frames" and config.validation.retrieval_images:
        yield (
            f"validation.retrieval_images: got {config.validation.retrieval_images} for data.items frames; expected 0: "
            "a caption is that of all frames of its clip"
        )
    told = config.conditioners
    if data.clips and (config.space.kind != "latent" or told.label or told.image or told.low_res):
        yield (
            f"data.items: got clips for space.kind {config.space.kind}; expected space.kind latent, and no "
            "conditioners but text and frames: nothing else knows of clips"
        )
    if frames is not None and not data.clips:
        yield f"conditioners.frames: got settings for data.source {data.source} of images; expected null"
    if frames is not None and frames.max_context and frames.between == 1:
        yield "conditioners.frames: got between 1, so that no first frames are given; expected max_context 0"
    if frames is not None and frames.between and data.num_frames < 3:
        yield f"conditioners.frames.between: got {frames.between:g} of 2 frames; expected 0, or data.num_frames above 2"
    if frames is not None and not frames.max_context and not frames.between:
        yield "conditioners.frames: got max_context 0 and between 0, so that no frame is given; expected one of the two"
    if frames is not None and frames.max_context >= data.num_frames:
        yield (
            f"conditioners.frames.max_context: got {frames.max_context} of data.num_frames {data.num_frames}; expected "
            "fewer"
        )


def _autoencoder_contradictions(config: AutoencoderConfig, path: str) -> Iterator[str]:
    if config.temporal is None and config.data.clips:
        yield "data.items: got all, clips; expected frames, or temporal: an autoencoder of images is trained on images"
    if config.temporal is not None and not config.data.clips:
        yield f"temporal: got settings for data.source {config.data.source} of images; expected null, or data of clips"
    if config.temporal is not None and "pretrained" not in config.autoencoder:
        yield "temporal: got settings for an autoencoder from scratch; expected autoencoder.pretrained, one of images"
    if config.reconstruction.change_weight and config.temporal is None:
        yield (
            f"reconstruction.change_weight: got {config.reconstruction.change_weight:g} without temporal; expected 0: "
            "images do not change"
        )


def _clip_contradictions(config: ClipConfig, path: str) -> Iterator[str]:
    if (parts := config.loop.gradient_accumulation_steps) != 1:
        yield (
            f"loop.gradient_accumulation_steps: got {parts}; expected 1: each image is compared with all captions of "
            "its batch, so parts of a batch have another loss; for larger batches use several processes"
        )
    if config.data.clips:
        yield "data.items: got all, clips; expected frames: a CLIP is trained on images"
    if config.data.crop_size is not None:
        yield "data.crop_size: got a size; expected null: captions are of whole images; see contrastive.smallest_crop"
    if config.data.batch_size < 2:
        yield "data.batch_size: got 1; expected 2 or more: an image is compared with the captions of others"


def _system_contradictions(config: SystemConfig, path: str) -> Iterator[str]:
    reserved = {field.name for field in fields(SystemConfig)}
    for name in config.stages:
        if not PLAIN_NAME.fullmatch(name) or name in reserved:
            yield f"stages: got {shown(name)}; expected the name of a folder, and none of {', '.join(sorted(reserved))}"
    if config.pipeline is not None and "model" in config.stages:
        yield "stages: got model, which is the folder of the joined pipeline; expected another name"
    if not config.stages:
        yield "stages: got none; expected a config file for each stage, by its name"


def _indivisible(config: RunConfig, name: str, part: int) -> Iterator[str]:
    batch = config.data.batch_size
    if part > 0 and batch % part:
        yield f"data.batch_size: got {batch}; expected a multiple of {name}, {part}"


CONTRADICTIONS: dict[type[Any], Callable[[Any, str], Iterator[str]]] = {
    DataConfig: _data_contradictions,
    TextConfig: _text_contradictions,
    RunConfig: _run_contradictions,
    StageConfig: _stage_contradictions,
    AutoencoderConfig: _autoencoder_contradictions,
    ClipConfig: _clip_contradictions,
    SystemConfig: _system_contradictions,
}
"""Checks of several fields together, by class; each yields lines like `faults`."""


def _text_faults(value: object, at: str, files: bool) -> Iterator[str]:
    """Yield the faults of texts: empty ones, which look like null, and those that cannot be written to a file."""
    if isinstance(value, Mapping):
        value = tuple(text for pair in value.items() for text in pair)
    texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
    if any(not text or _unwritable(text) for text in texts):
        yield f"{at}: expected text of at least one character, without NUL and lone surrogates; null for none"
    elif files and any(map(_too_long, texts)):
        yield f"{at}: a name of more than 255 bytes, which no file has"


def _network_faults(network: Mapping[Any, Any], at: str) -> Iterator[str]:
    """Yield the faults of a network's keys and values that are wrong for every class; building it finds the others."""
    for key, value in network.items():
        if not isinstance(key, str) or not key or _unwritable(key):
            yield f"{at}: got the key {shown(key)}; expected the name of an argument"
        elif key in NAMES and not (isinstance(value, str) and value):
            if value is not None or key in ("_class_name", "pretrained"):
                yield f"{at}.{key}: got {type(value).__name__}; expected a name"
        elif key == "pretrained" and _too_long(value):
            yield f"{at}.{key}: a name of more than 255 bytes, which no file has"
        elif reason := _value_fault(value, "layers" in key):
            yield f"{at}.{key}: {reason}"


def _value_fault(value: object, layers: bool, depth: int = 0) -> str | None:
    """Return the fault of a value of a network's config, None if it has none.

    It does not quote the value: the key may be unknown, and the value a secret.
    """
    if isinstance(value, list | tuple) and depth < MAX_DEPTH:
        return next((reason for entry in value if (reason := _value_fault(entry, layers, depth + 1))), None)
    if isinstance(value, str):
        return "text with NUL or lone surrogates" if _unwritable(value) else None
    if isinstance(value, bool | None):
        return None
    if not isinstance(value, int | float):
        return f"got a {type(value).__name__}; expected a number, text, true, false, null, or a list of those"
    if not -(2**53) <= value <= 2**53:
        return "not a finite number, or one beyond 2**53"
    return f"more than {MAX_LAYERS} layers" if layers and value > MAX_LAYERS else None


def _unwritable(text: str) -> bool:
    return "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)


def _too_long(path: str) -> bool:
    return any(len(name.encode()) > 255 for name in path.split("/"))


def shown(value: object) -> str:
    """Return the `repr` of a value, cut to 80 characters; whole numbers that are too long for `repr` as hex."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return f"{value:#x}"[:80] if isinstance(value, int) else f"a {type(value).__name__}"
