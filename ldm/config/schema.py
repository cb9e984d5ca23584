"""What one run is: frozen dataclasses, one for each part, read from one YAML file.

Nothing here computes. `ldm.config.file` reads and checks them; each part is built from its own dataclass.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, TypedDict

from ldm.config.conditioners import ConditionersConfig, Network

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
PathName = Literal["linear", "scaled_linear", "cosine", "flow"]
SourceName = Literal["openmoji", "imagefolder", "parquet", "dataset"]


class DataOptions(TypedDict, total=False):
    """The fields of `DataConfig` that decide how data are read: said to a command, or recorded with a model."""

    source: SourceName
    """As data.source of a training; left out: seen from what lies there."""
    split: str
    """Split of a `datasets` data set."""
    image_column: str | None
    """Column of the images; null: found by its usual names."""
    caption_column: str | None
    """Column of the captions; null: found by its usual names."""
    class_column: str | None
    """Column of class numbers, for a model of classes; of openmoji: group."""
    background: str
    """Colour under transparent pixels."""
    languages: tuple[str, ...]
    """Caption languages of openmoji."""
    limit: int | None
    """How many images are kept; null: all."""
    held_out: dict[str, str]
    """Files of held-out captions, as {"validation": FILE, "test": FILE}; {}: held out by hash."""
    held_out_percent: float
    """Without held_out: percent of the images for validation, and as many for test, by hash."""


@dataclass(frozen=True)
class DataConfig:
    """Captioned images and how they become batches."""

    source: SourceName = "openmoji"
    path: str | None = None
    """Folder, Parquet file or data set name; not used by openmoji."""
    split: str = "train"
    """Split to read, of those that `datasets` finds; our own train/validation/test split is made from it. A folder or
    table whose names of folders and files say nothing of splits is all train."""
    licence: str | None = None
    """Licence of the images, for the model card, such as CC BY 4.0; that of openmoji is known."""
    image_column: str | None = None
    """None: file_name of metadata, the column of images of a table, or one of a usual name (image, image, ...)."""
    caption_column: str | None = None
    """None: the one of a usual name (text, caption, captions, prompt, ...); without one there are no captions."""
    class_column: str | None = None
    """Column of class numbers, from 0 on, for `conditioners.label`; of openmoji: group, Unicode's nine."""
    on_bad_data: Literal["error", "skip"] = "error"
    """What rows do that cannot be trained on: stop the run before its first step, or are left out and counted."""
    image_size: int = 64
    """Pixels, height and width."""
    background: str = "white"
    """Colour under transparent pixels (any PIL colour)."""
    languages: tuple[str, ...] = ("en",)
    """Caption languages of openmoji; several: one is drawn each time an image is loaded."""
    flip: bool = False
    """Mirror half of the images; only right where captions and images have no left and right."""
    limit: int | None = None
    """Keep only this many images of all splits together, the first by hash, for trials."""
    held_out: dict[str, str] = field(default_factory=dict)
    """``{"validation": file, "test": file}``: captions, a line each, whose images no stage trains on."""
    held_out_percent: float = 2.0
    """Without `held_out`: percent of the images for validation, and as many for test, by pixel hash. One image of
    two or more is for validation at least, unless it is 0, with which nothing can be trained."""
    batch_size: int = 64
    """Images per optimiser step, over all processes and accumulation steps."""
    workers: int = 0
    """Loader processes per training process; 0 loads in the training process."""
    timeout_seconds: float = 300.0
    """A loader process that takes longer than this for a batch ends the run."""
    cache: bool = True
    """Keep what frozen networks compute from an image or a caption (latents, prompt embeddings)."""


@dataclass(frozen=True)
class SpaceConfig:
    """What is diffused."""

    kind: Literal["pixel", "latent", "embedding"] = "latent"
    autoencoder: str | None = None
    """Folder or Hub name of the autoencoder of a latent space, or of a pipeline with it: AutoencoderKL or VQModel."""
    image_encoder: str | None = None
    """Folder or Hub name of the CLIP vision model of an embedding space, or of a pipeline with it."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """From noise to loss; the sampling scheduler is derived from the same values."""

    path: PathName = "scaled_linear"
    prediction_type: PredictionType = "epsilon"
    num_train_timesteps: int = 1000
    """Steps of the discrete paths; the flow path is continuous and only scales its time by it."""
    zero_terminal_snr: bool = False
    """Rescale a discrete path so that its last step is pure noise (Lin et al. 2024)."""
    timestep_density: Literal["uniform", "logit_normal", "loss_second_moment"] = "uniform"
    """logit_normal: Esser et al. 2024; loss_second_moment: for variational_only (Nichol & Dhariwal 2021, eq. 18)."""
    logit_mean: float = 0.0
    """Mean of the logit of the time (0: data, 1: noise) under logit_normal; positive: more noise."""
    logit_std: float = 1.0
    min_snr_gamma: float | None = None
    """Clamp of the signal-to-noise weight (Hang et al. 2023); None: unweighted."""
    variational_weight: float | None = None
    """Learn the variance of sampling too: weight of one step's term of its bound, in bits. Usual is 1: lambda =
    0.001 of Nichol & Dhariwal 2021, eq. 16, at 1000 steps. The denoiser has twice the output channels, and
    our pipeline samples it, the stock one does not. None: fixed."""
    variational_only: bool = False
    """Train the mean by the bound as well, and by nothing else: L_vlb of Nichol & Dhariwal 2021, for likelihoods."""


@dataclass(frozen=True)
class SamplerConfig:
    """The scheduler that draws during validation and is saved with the model; any other can take its place later."""

    kind: Literal["dpm_solver", "ddim", "ddpm"] = "dpm_solver"
    """dpm_solver: DPM-Solver++, 20 to 50 steps, the only one on the flow path; ddim; ddpm: ancestral, hundreds."""
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small"
    """Of ddpm: the posterior's or beta (Ho et al. 2020, section 3.2); learned with objective.variational_weight."""


@dataclass(frozen=True)
class ReconstructionConfig:
    """Autoencoder losses; each is per element of the image, so the weights do not depend on its size."""

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    kl_weight: float = 1e-6
    """Weight of the KL to N(0, I), summed over the latent and divided by the number of image elements."""
    learned_logvar: bool = False
    """Learn the scale of the error, so that the loss is a likelihood (Dai & Wipf 2019)."""
    perceptual: Literal["none", "efficientnet_lite2", "lpips_vgg"] = "none"
    """Distance in the features of a pretrained network (Zhang et al. 2018)."""
    perceptual_weight: float = 1.0
    lpips_weights: str | None = None
    """safetensors file of lpips_vgg: ``safetensors.torch.save_model(lpips.LPIPS(net="vgg"), FILE)``."""
    adversarial: Literal["none", "hinge", "minimax"] = "none"
    """Loss of a PatchGAN that is trained along (Isola et al. 2017; Goodfellow et al. 2014)."""
    adversarial_weight: float = 0.5
    adaptive: bool = True
    """Scale it to the error's gradient at the decoder's last layer (Esser et al. 2021, eq. 7)."""
    discriminator_start_step: int = 0
    """Steps before which the discriminator is neither used nor trained."""
    discriminator_channels: int = 64
    discriminator_layers: int = 3


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning rate, a pure function of the step."""

    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final_fraction: float = 0.0
    """Share of the learning rate that is left at the last step of a decay."""
    ema_decay: float = 0.999
    """Largest decay of the averaged weights; the first steps use (1 + step) / (10 + step)."""


@dataclass(frozen=True)
class LoopConfig:
    """How long, how often, on what."""

    max_train_steps: int | None = None
    max_train_epochs: float | None = None
    max_train_seconds: float | None = None
    """Exactly one of the three. Seconds are turned into steps once, from the time of the first steps."""
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device computes faster with it (measured), else float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    xformers: bool = False
    """Attention by xformers, on a GPU; torch's own is as good on most."""
    log_every_steps: int = 10
    save_every_steps: int = 1000
    keep_checkpoints: int = 2
    process_timeout_seconds: float = 1800.0
    """A process that waits longer than this for the others ends, and the run with it."""
    validate_every_steps: int = 1000
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)


@dataclass(frozen=True)
class ValidationConfig:
    """What is looked at during training, always with the averaged weights and fixed noise."""

    num_images: int = 8
    """Held-out images on the sheet of each validation, generated (or reconstructed) beside true."""
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    loss_images: int = 128
    """Images of the validation split that the held-out loss is measured on."""
    retrieval_images: int = 0
    """Captions of the validation split that are sampled for held-out retrieval; 0: not measured."""


@dataclass(frozen=True)
class DoctorConfig:
    """Only look whether this config can learn and what it will cost (OUTPUT_DIR/doctor), and train nothing."""

    price_per_hour: float | None = None
    """Of the machine, in any currency: of the other one if `gpu_tflops` describes it, else of this one."""
    gpu_tflops: float | None = None
    """Peak speed of another machine's GPU in TFLOP/s, at the precision that it will train in."""
    gpu_memory_gib: float | None = None
    """Memory of another machine's GPU in GiB."""


@dataclass(frozen=True)
class RunConfig:
    """One run of any kind of training: its folder, its data, its optimiser and how long it takes."""

    output_dir: str
    _: KW_ONLY
    seed: int = 0
    resume_check: bool = False
    """Train nothing, but prove on this config that a killed and resumed training equals one that was not."""
    doctor: DoctorConfig | None = None
    """Look whether this config can learn and what it will cost, and train nothing; `--doctor` alone will do."""
    allow_config_change: bool = False
    """Resume also if the config or the images are others than those the training was started with."""
    push_to_hub: str | None = None
    """Hub repository, user/name, that the finished model goes to. The token: HF_TOKEN or ``hf auth login``."""
    push_every_steps: int | None = None
    """Push the model as it stands every so many steps too; None: only the finished one."""
    push_private: bool = False
    """Make the repository private; False: as the account has it, usually public."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass(frozen=True)
class StageConfig(RunConfig):
    """A diffusion stage: space + denoiser + objective + conditioners."""

    denoiser: Network
    """UNet2DConditionModel's config keys, or ``pretrained: FOLDER`` to go on from one, alone or in a pipeline."""
    _: KW_ONLY
    snapshot_every_steps: int | None = None
    """Keep averages from which one of any length is made afterwards (`ldm average`); None: no, at no cost."""
    snapshot_sigma_rels: tuple[float, ...] = (0.05, 0.10)
    """Their lengths, shares of the training. Each is another copy of the trained weights, also in every snapshot."""
    space: SpaceConfig = field(default_factory=SpaceConfig)
    conditioners: ConditionersConfig = field(default_factory=ConditionersConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass(frozen=True)
class AutoencoderConfig(RunConfig):
    """An autoencoder and its losses."""

    autoencoder: Network
    """AutoencoderKL's config keys, or ``pretrained: FOLDER`` to go on from one, alone or in a pipeline."""
    _: KW_ONLY
    save_dtype: Literal["float32", "float16"] = "float32"
    """Of the weights in the model folder; checkpoints are always float32."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
