"""Train text-to-image latent diffusion models from scratch."""

import os

# Read once, when the libraries are imported; what the environment says already stays.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # of huggingface_hub, diffusers, transformers and datasets
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask a bot to convert, and load that

__version__ = "0.1.0"
