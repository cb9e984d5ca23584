"""The fields of a run's config: one frozen dataclass for each part.

Nothing here computes but a few properties that follow from several fields. `ldm.config.file` reads and checks them;
each part of a run is built from its own dataclass.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, TypedDict

from ldm.config.conditioners import ConditionersConfig, Network

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
PathName = Literal["linear", "scaled_linear", "cosine", "flow"]
SourceName = Literal["openmoji", "openmoji_clips", "imagefolder", "videofolder", "parquet", "dataset"]
CLIPS = ("openmoji_clips", "videofolder")
"""Sources whose items are clips."""


class DataOptions(TypedDict, total=False):
    """The fields of `DataConfig` that decide how data are read: options of a command, or recorded with a model."""

    source: SourceName
    """Kind of data, as data.source of a training; left out: recognised by its files."""
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
    groups: tuple[str, ...]
    """Unicode's groups of emoji that are taken of openmoji, such as Food & Drink; (): all images."""
    items: Literal["all", "frames"]
    """Items of clips: all, the clips; or frames, each frame as an image."""
    num_frames: int
    """Frames of a clip."""
    video_frames: int | None
    """Frames of a whole motion of openmoji_clips, of which clips are cut; null: a clip is a whole motion."""
    stride: int | None
    """Frames between the beginnings of two clips of one video; null: num_frames."""
    frame_rate: float | None
    """Frames a second of the films of a videofolder; null: all frames."""
    short_films: Literal["error", "loop"]
    """Films that are too short: bad data, or begun again at their end."""
    limit: int | None
    """Number of images that are kept; null: all."""
    held_out: dict[str, str]
    """Files of held-out captions, as {"validation": FILE, "test": FILE}; {}: held out by hash."""
    held_out_percent: float
    """Without held_out: percent of the images for validation, and as many for test, by hash."""


@dataclass(frozen=True)
class DataConfig:
    """Captioned images and how they become batches."""

    source: SourceName = "openmoji"
    path: str | None = None
    """Folder of images or films, Parquet file or data set name; not used by openmoji and openmoji_clips."""
    split: str = "train"
    """Split to read, one of those that `datasets` finds; our own train/validation/test split is made from it. If the
    names of folders and files define no splits, all data is train."""
    licence: str | None = None
    """Licence of the images, for the model card, such as CC BY 4.0; that of openmoji is known."""
    image_column: str | None = None
    """Column of the images. None: file_name in metadata; in a table the column of type Image, else the one with a usual
    name (image, images, img, ...)."""
    caption_column: str | None = None
    """Column of the captions. None: the one with a usual name (text, caption, captions, prompt, ...); without such a
    column there are no captions."""
    class_column: str | None = None
    """Column of class numbers, from 0 on, for `conditioners.label`; of openmoji: group, Unicode's nine."""
    on_bad_data: Literal["error", "skip"] = "error"
    """Rows that cannot be trained on: error stops the run before its first step, skip leaves them out."""
    image_size: int = 64
    """Pixels, height and width."""
    crop_size: int | None = None
    """Train on random square crops of so many pixels of each image, at a place that is drawn each time; validation sees
    whole images. Only for what looks at pixels: an autoencoder, or a stage in pixel space that is not conditioned, or
    on the small image of the crop. Null: whole images."""
    background: str = "white"
    """Colour under transparent pixels (any PIL colour)."""
    languages: tuple[str, ...] = ("en",)
    """Caption languages of openmoji; several: one is chosen at random each time an image is loaded."""
    groups: tuple[str, ...] = ()
    """Unicode's groups of emoji that are taken of openmoji and openmoji_clips, without skin tones, such as Food &
    Drink; empty: all images."""
    num_frames: int = 8
    """Frames of each clip; not used where the source has images."""
    video_frames: int | None = None
    """Frames of a whole motion of openmoji_clips, of which clips are cut; null: a clip is a whole motion."""
    frame_rate: float | None = None
    """Frames a second that are taken of the films of a videofolder, each the one that is shown then; null: all."""
    short_films: Literal["error", "loop"] = "error"
    """Films of fewer than num_frames: bad data; or they begin again at their end, until they are long enough."""
    stride: int | None = None
    """Frames from the beginning of a clip to that of the next one cut from the same video; null: num_frames, so that no
    frame is in two."""
    items: Literal["all", "frames"] = "all"
    """Of clips: all, each clip is a sample; frames, each frame is a sample, an image with the caption of its clip."""
    flip: bool = False
    """Mirror half of the images; only right where captions and images have no left and right."""
    limit: int | None = None
    """Keep only this many images of all splits together, the first by hash; for trials."""
    held_out: dict[str, str] = field(default_factory=dict)
    """``{"validation": file, "test": file}``: files of captions, one a line, whose images no stage trains on."""
    held_out_percent: float = 2.0
    """Without `held_out`: percent of the images for validation, and as many for test, by pixel hash. Above 0, at least
    one image is for validation; with 0 and no `held_out` nothing can be trained."""
    balance: Literal["items", "subjects", "classes"] = "items"
    """An epoch of training has one sample of each item; or one of each subject, for openmoji a person in all skin tones
    and every thing alike; or one of each class of `class_column`. Items that share one take turns."""
    batch_size: int = 64
    """Images per optimiser step, over all processes and accumulation steps."""
    workers: int = 0
    """Loader processes per training process; 0 loads in the training process."""
    timeout_seconds: float = 300.0
    """The run ends if a loader process takes longer than this for a batch."""
    cache: bool = True
    """Cache the outputs of frozen networks for each image and caption (latents, prompt embeddings)."""

    @property
    def clip_stride(self) -> int:
        """Frames from the beginning of a clip to that of the next one."""
        return self.num_frames if self.stride is None else self.stride

    @property
    def clips(self) -> bool:
        """True if the items are clips, and not images."""
        return self.source in CLIPS and self.items == "all"


@dataclass(frozen=True)
class SpaceConfig:
    """The space to diffuse in."""

    kind: Literal["pixel", "latent", "embedding"] = "latent"
    image_size: int | None = None
    """Pixels, height and width, of the images that are diffused in a pixel space, if they are smaller than
    data.image_size, at which the conditioners see them; null: as large."""
    autoencoder: str | None = None
    """Folder or Hub name of the autoencoder of a latent space, or of a pipeline with it: AutoencoderKL, VQModel, or one
    with a temporal decoder (VideoAutoencoder)."""
    image_encoder: str | None = None
    """Folder or Hub name of the CLIP vision model of an embedding space, or of a pipeline with it."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Noise path, prediction type and loss; the sampling scheduler is derived from the same values."""

    path: PathName = "scaled_linear"
    prediction_type: PredictionType = "epsilon"
    num_train_timesteps: int = 1000
    """Number of steps of the discrete paths; the flow path is continuous, and only its time is scaled by it."""
    zero_terminal_snr: bool = False
    """Rescale a discrete path so that its last step is pure noise (Lin et al. 2024)."""
    timestep_density: Literal["uniform", "logit_normal", "loss_second_moment", "last"] = "uniform"
    """logit_normal: Esser et al. 2024; loss_second_moment: for variational_only (Nichol & Dhariwal 2021, eq. 18); last:
    always from pure noise, which makes of prediction_type sample a regression, sampled in one step."""
    logit_mean: float = 0.0
    """Mean of logit(t) for logit_normal, where t is 0 at the data and 1 at the noise; positive: more noise."""
    logit_std: float = 1.0
    min_snr_gamma: float | None = None
    """Clamp of the signal-to-noise weight (Hang et al. 2023); None: unweighted."""
    variational_weight: float | None = None
    """Learn the variance of sampling too; None: fixed. It is the weight of one step's term of the variational bound, in
    bits. 1 is usual: lambda = 0.001 of Nichol & Dhariwal 2021, eq. 16, at 1000 steps. The denoiser needs twice the
    output channels. Our pipeline can sample it; the model card says whether the stock one can."""
    variational_only: bool = False
    """Train the mean with the variational bound only: L_vlb of Nichol & Dhariwal 2021, for likelihoods."""


@dataclass(frozen=True)
class SamplerConfig:
    """The scheduler that samples during validation and is saved with the model; it can be replaced later."""

    kind: Literal["dpm_solver", "ddim", "ddpm", "unclip"] = "dpm_solver"
    """dpm_solver: DPM-Solver++, 20 to 50 steps, the only one for the flow path; ddim; ddpm: ancestral sampling,
    hundreds of steps; unclip: ddpm as diffusers' pipelines of priors need it, on the cosine path, for predicted x0."""
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small"
    """Variance of ddpm's noise: the posterior's (fixed_small) or beta (fixed_large; Ho et al. 2020, section 3.2). With
    objective.variational_weight it is learned instead."""
    thresholding: float | None = None
    """Dynamic thresholding, of pixels only: at each step the estimate of an image is clipped at this quantile of its
    absolute values, and at 1 at least, and divided by that (Saharia et al. 2022, section 2.3, where it is 0.995). It
    keeps strong guidance from saturated colours in photographs; white grounds turn grey with it. None: as the sampler
    does without."""


@dataclass(frozen=True)
class ReconstructionConfig:
    """Autoencoder losses; each is a mean over the elements of the image, so that weights do not depend on its size."""

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    kl_weight: float = 1e-6
    """AutoencoderKL: weight of the KL to N(0, I), summed over the latent and divided by the number of image values."""
    codebook_weight: float = 1.0
    """VQModel: weight of the loss that brings codes to latents, and latents by a quarter of it to codes."""
    codebook_share: float = 1.0
    """VQModel: share of the images that are decoded from their codes in training, the others from their latents. Below
    1 the decoder learns both; denoisers give it latents alone (Défossez et al. 2024 quantise half of the time)."""
    revive_after_steps: int | None = 100
    """VQModel: a code that no latent used for so many steps is moved to a latent of the batch; null: it stays."""
    learned_logvar: bool = False
    """Learn the scale of the error, so that the loss is a likelihood (Dai & Wipf 2019)."""
    perceptual: Literal["none", "efficientnet_lite2", "lpips_vgg"] = "none"
    """Distance in the features of a pretrained network (Zhang et al. 2018)."""
    perceptual_weight: float = 1.0
    lpips_weights: str | None = None
    """safetensors file of lpips_vgg: ``safetensors.torch.save_model(lpips.LPIPS(net="vgg"), FILE)``."""
    adversarial: Literal["none", "hinge", "minimax"] = "none"
    """Loss of a PatchGAN that is trained with the autoencoder (Isola et al. 2017; Goodfellow et al. 2014)."""
    adversarial_weight: float = 0.5
    adaptive: bool = True
    """Scale the adversarial loss: its gradient at the decoder's last layer is made as large as the reconstruction
    error's (Esser et al. 2021, eq. 7)."""
    change_weight: float = 0.0
    """Weight of the absolute error of the change from frame to frame of clips, which is seen as flicker."""
    discriminator_start_step: int = 0
    """First step at which the discriminator is used and trained."""
    discriminator_channels: int = 64
    discriminator_layers: int = 3


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, learning rate schedule and averaged weights."""

    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    decay_fraction: float = 1.0
    """Share of the training, at its end, in which the learning rate decays; 1: all of it that follows the warm-up."""
    final_fraction: float = 0.0
    """Share of the learning rate that is left at the last step of a decay."""
    ema_decay: float = 0.999
    """Largest decay of the averaged weights; the first steps use (1 + step) / (10 + step)."""


@dataclass(frozen=True)
class LoopConfig:
    """Length of the training, precision and memory, and how often it logs, saves and validates."""

    max_train_steps: int | None = None
    max_train_epochs: float | None = None
    max_train_seconds: float | None = None
    """Set exactly one of the three. Seconds, of steps alone, become a number of steps when the learning rate begins to
    decay. With optim.decay_fraction 0.3 they are kept even if the machine slows down in the first half."""
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device computes faster with it (measured), else float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    xformers: bool = False
    """Use xformers' attention, on a GPU; on most GPUs torch's own is as good."""
    log_every_steps: int = 10
    save_every_steps: int = 1000
    keep_checkpoints: int = 2
    process_timeout_seconds: float = 1800.0
    """The run ends if a process waits longer than this for the others."""
    validate_every_steps: int = 1000
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)


@dataclass(frozen=True)
class ValidationConfig:
    """The validation during training, always with the averaged weights and the same noise."""

    num_images: int = 8
    """Held-out images on each validation's sheet: true ones beside generated (or reconstructed) ones."""
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    loss_images: int = 128
    """Number of images of the validation split for the held-out loss."""
    retrieval_images: int = 0
    """Captions of the validation split for which images are sampled and held-out retrieval is measured; 0: none."""


@dataclass(frozen=True)
class DoctorConfig:
    """Check if this config can learn and estimate its cost (OUTPUT_DIR/doctor), and train nothing."""

    price_per_hour: float | None = None
    """Price of an hour, in any currency: of the machine that `gpu_tflops` describes, else of this one."""
    gpu_tflops: float | None = None
    """Peak speed of another machine's GPU in TFLOP/s, at its training precision."""
    gpu_memory_gib: float | None = None
    """Memory of another machine's GPU in GiB."""


@dataclass(frozen=True)
class RunConfig:
    """A run of any kind of training: its folder, data, optimiser and length."""

    output_dir: str
    _: KW_ONLY
    seed: int = 0
    resume_check: bool = False
    """Only prove, with this config, that a killed and resumed training equals an uninterrupted one."""
    doctor: DoctorConfig | None = None
    """Only check if this config can learn and estimate its cost; `--doctor` alone is enough."""
    allow_config_change: bool = False
    """Resume even if the config or the images have changed since the training began."""
    push_to_hub: str | None = None
    """Hub repository, user/name, to which the finished model is pushed. Token: HF_TOKEN or ``hf auth login``."""
    push_every_steps: int | None = None
    """Push the current model after every so many steps too; None: only the finished one."""
    push_private: bool = False
    """Make the repository private; False: the account's default, usually public."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass(frozen=True)
class TemporalConfig:
    """Temporal layers, which make a denoiser of clips of one of images (`ldm.models.temporal`)."""

    head_dim: int = 32
    """Width of an attention head in them."""
    freeze_image_layers: bool = True
    """Train the temporal layers alone; false: the layers of the image network with them."""


@dataclass(frozen=True)
class StageConfig(RunConfig):
    """A diffusion stage: space + denoiser + objective + conditioners."""

    denoiser: Network
    """UNet2DConditionModel's config keys, or ``pretrained: FOLDER`` to go on from one, alone or in a pipeline."""
    _: KW_ONLY
    snapshot_every_steps: int | None = None
    """Save snapshots of averaged weights, from which `ldm average` makes one of any length; None: none."""
    snapshot_sigma_rels: tuple[float, ...] = (0.05, 0.10)
    """Lengths of these averages, as shares of the training. Each needs one more copy of the trained weights, in memory
    and in every snapshot."""
    temporal: TemporalConfig | None = None
    """Temporal layers over `denoiser`, a UNet2DConditionModel of images, or the settings of those that a pretrained one
    has; null: a model of images."""
    space: SpaceConfig = field(default_factory=SpaceConfig)
    conditioners: ConditionersConfig = field(default_factory=ConditionersConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    @property
    def sampled_size(self) -> int:
        """Pixels, height and width, of the images that it samples."""
        return self.space.image_size or self.data.image_size


@dataclass(frozen=True)
class ClipNetworkConfig:
    """The two encoders of a CLIP, and its tokenizer."""

    pretrained: str | None = None
    """Folder or Hub name of a CLIP to go on from, with its tokenizer; None: from scratch."""
    text: Network = field(default_factory=dict)
    """CLIPTextConfig's keys."""
    vision: Network = field(default_factory=dict)
    """CLIPVisionConfig's keys."""
    projection_dim: int = 512
    """Width of the embeddings of images and texts."""
    vocab_size: int = 4096
    """Tokens of the tokenizer that is learned from the training captions."""
    max_length: int = 77
    """Tokens of a caption, begin and end included; longer ones are cut."""


@dataclass(frozen=True)
class ContrastiveConfig:
    """The contrastive loss of a CLIP."""

    max_logit_scale: float = 100.0
    """Upper limit of the learned inverse temperature (Radford et al. 2021, section 2.5)."""
    smallest_crop: float = 1.0
    """Images are trained on in random square crops of at least this share of their width; 1: whole."""


@dataclass(frozen=True)
class ClipConfig(RunConfig):
    """A CLIP, trained on images and their captions."""

    clip: ClipNetworkConfig
    _: KW_ONLY
    save_dtype: Literal["float32", "float16"] = "float32"
    """Type of the weights in the model folder; checkpoints are always float32."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)


@dataclass(frozen=True)
class TemporalDecoderConfig:
    """Temporal layers in the decoder of an autoencoder (`ldm.models.temporal`)."""

    freeze_image_layers: bool = True
    """Train the temporal layers alone, so that single images are decoded as before; false: the decoder with them."""


@dataclass(frozen=True)
class AutoencoderConfig(RunConfig):
    """An autoencoder and its losses."""

    autoencoder: Network
    """Config keys of AutoencoderKL or VQModel, or ``pretrained: FOLDER`` to go on from one, alone or in a pipeline."""
    _: KW_ONLY
    temporal: TemporalDecoderConfig | None = None
    """Temporal layers in the decoder of `autoencoder`, a pretrained AutoencoderKL whose encoder stays as it is, trained
    on clips; null: an autoencoder of images."""
    save_dtype: Literal["float32", "float16"] = "float32"
    """Type of the weights in the model folder; checkpoints are always float32."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)


@dataclass(frozen=True)
class SystemConfig:
    """A system: stages that are trained one after another, each in the folder of its name in `output_dir`.

    ``--STAGE.path.to.field VALUE`` changes the config of a stage.
    """

    output_dir: str
    stages: dict[str, str]
    """Config file of each stage, by its name, in the order of the training. In these configs, a path into another
    stage's own output_dir is a path into that stage's folder of this system."""
    _: KW_ONLY
    pipeline: str | None = None
    """Class of the pipeline that the finished stages are joined into, in `output_dir`/model; null: they stay apart."""
    doctor: DoctorConfig | None = None
    """Only check if every stage can learn and estimate the cost of all; `--doctor` alone is enough."""
