"""From a batch to losses: one class for diffusion stages, one for autoencoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ldm.conditioning import Inputs, TextConditioner
from ldm.config import ReconstructionConfig
from ldm.data.batches import Batch
from ldm.data.positions import generator, generators
from ldm.reconstruction import reconstruction_loss
from ldm.spaces import LatentSpace, Moments
from ldm.stage import ConditionedDenoiser, Stage
from ldm.training.averages import Average
from ldm.training.run import Run


class DiffusionStep:
    """A diffusion stage: noise x0, predict, compare."""

    def __init__(self, stage: Stage, run: Run, ema_decay: float):
        self.stage, self.run = stage, run
        stage.model.to(run.device)
        self.modules = {"denoiser": stage.model}
        self.averages = {"denoiser": Average(stage.model, ema_decay)}
        self.forwards = {"denoiser": run.prepare(stage.model)}
        stage.model.denoiser.train()

    @property
    def averaged(self) -> ConditionedDenoiser:
        """The model with averaged weights: what validation, export and evaluation use."""
        return cast(ConditionedDenoiser, self.averages["denoiser"].module)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and std of x0 given pictures, (B, 3, H, W): what the cache keeps."""
        moments = self.stage.space.moments(pixel_values.to(self.run.device))
        return moments.mean, moments.std

    def pipeline_components(self) -> dict[str, Any]:
        """Return what the text-to-image pipeline is made of, but the scheduler: the averaged weights, live."""
        if not isinstance(self.stage.space, LatentSpace) or "text" not in self.averaged.conditioners:
            raise ValueError("a text-to-image pipeline needs space.kind: latent and conditioners.text; set both")
        text = cast(TextConditioner, self.averaged.conditioners["text"])
        return {
            "vae": self.stage.space.autoencoder,
            "text_encoder": text.text_encoder,
            "tokenizer": text.tokenizer,
            "unet": self.averaged.denoiser,
        }

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean loss; every draw comes from its sample's position."""
        inputs = self.inputs(batch)
        model = self.forwards["denoiser"]

        def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
            return cast(Tensor, model(x_t, timesteps, inputs))

        draws = generators(self.run.seed, batch.positions, "noise")
        return {"denoiser": self.stage.objective.loss(predict, self.x0(batch), draws).mean()}

    def x0(self, batch: Batch) -> Tensor:
        """Return what is diffused, drawn anew from the posterior, on the run's device."""
        if batch.moments is not None:
            moments = Moments(*(tensor.to(self.run.device) for tensor in batch.moments))
        else:
            moments = self.stage.space.moments(cast(Tensor, batch.pixel_values).to(self.run.device))
        return moments.sample(generators(self.run.seed, batch.positions, "posterior"))

    def inputs(self, batch: Batch, drop: bool = True) -> dict[str, Inputs]:
        """Return each conditioner's inputs, on the run's device, with its share dropped unless `drop` is False."""
        inputs = {}
        for name in self.stage.model.conditioners:
            conditioner = self.stage.model.conditioner(name)
            rate = conditioner.dropout if drop else 0.0
            dropped = [
                torch.rand((), generator=generator(self.run.seed, position, f"drop-{name}")).item() < rate
                for position in batch.positions
            ]
            tensors = conditioner.inputs(batch, dropped)
            inputs[name] = {key: tensor.to(self.run.device) for key, tensor in tensors.items()}
        return inputs

    @torch.no_grad()
    def held_out_losses(self, batch: Batch, levels: Sequence[float]) -> dict[str, float]:
        """Return the averaged model's mean loss over a batch at each noise level in (0, 1), with fixed noise."""
        x0, inputs = self.x0(batch), self.inputs(batch, drop=False)
        draws = generators(self.run.seed, batch.positions, "validation")
        noise = torch.stack([torch.randn(x0.shape[1:], generator=draw) for draw in draws]).to(x0)

        def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
            return cast(Tensor, self.averaged(x_t, timesteps, inputs))

        losses = {}
        for level in levels:
            u = torch.full((len(x0),), level, device=x0.device)
            losses[f"validation/loss_at_{level:.2f}"] = float(
                self.stage.objective.loss_at(predict, x0, noise, u).mean()
            )
        return {"validation/loss": sum(losses.values()) / len(losses), **losses}


class Autoencoding(nn.Module):
    """An autoencoder's whole pass behind one forward, so that every process sees the same graph."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pixel_values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstruction (B, 3, H, W) and the posterior's mean and log-variance, (B, C, h, w)."""
        posterior = self.autoencoder.encode(pixel_values).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.autoencoder.decode(latents, return_dict=False)[0], posterior.mean, posterior.logvar


class AutoencoderStep:
    """An autoencoder: encode, draw, decode, compare."""

    def __init__(self, autoencoder: AutoencoderKL, config: ReconstructionConfig, run: Run, ema_decay: float):
        self.run, self.config = run, config
        module = Autoencoding(autoencoder).to(run.device).train()
        self.latent_channels = int(autoencoder.config.latent_channels)
        self.factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        self.modules = {"autoencoder": module}
        self.averages = {"autoencoder": Average(module, ema_decay)}
        self.forwards = {"autoencoder": run.prepare(module)}

    @property
    def averaged(self) -> AutoencoderKL:
        """The autoencoder with averaged weights."""
        return cast(Autoencoding, self.averages["autoencoder"].module).autoencoder

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean loss."""
        pixel_values = cast(Tensor, batch.pixel_values).to(self.run.device)
        size = pixel_values.shape[-1] // self.factor
        draws = generators(self.run.seed, batch.positions, "posterior")
        noise = torch.stack([torch.randn(self.latent_channels, size, size, generator=draw) for draw in draws])
        reconstruction, mean, logvar = self.forwards["autoencoder"](pixel_values, noise.to(self.run.device))
        return {"autoencoder": reconstruction_loss(pixel_values, reconstruction, mean, logvar, self.config)}
