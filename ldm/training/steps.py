"""From a batch to losses: the contract of a step, one class for diffusion stages, one for autoencoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ldm.conditioners.conditioning import Inputs
from ldm.config import ReconstructionConfig
from ldm.data.batches import Batch, CaptionedImages
from ldm.data.positions import generator, generators
from ldm.errors import ConfigError
from ldm.evaluation.conditions import Condition, conditions_of
from ldm.models.autoencoder import Autoencoder, downsampling_factor, last_weight
from ldm.models.bottleneck import bottleneck_of
from ldm.models.clip import ImageEncoder
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.features import EFFICIENTNETS, build_perceptual_distance
from ldm.models.network import image_layers_hash, network_hash, weights_sha256
from ldm.models.provenance import trained_through
from ldm.models.temporal import VideoAutoencoder
from ldm.models.vision import tower
from ldm.objectives.reconstruction import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    negative_log_likelihood,
    reconstruction_error,
)
from ldm.spaces import Moments, time_last
from ldm.stage import ConditionedDenoiser, Stage
from ldm.training.averages import Average, exponential, power_function
from ldm.training.loop import TrainingStep
from ldm.training.run import Run

Drawn = tuple[list[int], Tensor, Tensor]
"""Positions, noise levels and unweighted losses of a micro-batch."""


class Step(TrainingStep[Batch], Protocol):
    """A `TrainingStep` on images that says what its networks are, for the record, the doctor and the alarms."""

    @property
    def run(self) -> Run:
        """Return the run that it trains in."""

    @property
    def networks(self) -> Sequence[str]:
        """Return the networks that it looks through, as `ldm.models.provenance.Provenance.networks`."""

    @property
    def frozen(self) -> Mapping[str, str]:
        """Return a hash of each network that it looks through and does not change, by its place."""

    @property
    def frozen_networks(self) -> Sequence[nn.Module]:
        """Return the networks that are neither trained nor part of a trained module."""

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that the trained weights belong to, None without one."""

    def not_finite_at(self) -> Sequence[float]:
        """Return the noise levels, in [0, 1], of the samples of the newest step whose loss is not finite."""


class DiffusionStep:
    """A diffusion stage: noise x0, predict, compare."""

    def __init__(self, stage: Stage, run: Run, ema_decay: float, sigma_rels: Sequence[float] = ()):
        """Track the average that is used, and a power-function one for each of `sigma_rels`."""
        self.stage, self.run = stage, run
        for part in (stage.model, *stage.space.networks):
            part.to(run.device)
        for network in (stage.model.denoiser, *stage.model.encoders()):
            run.switch(network)
        self.modules = {"denoiser": stage.model}
        self.power_averages = {value: Average(stage.model, power_function(value)) for value in sigma_rels}
        self.averages = {"denoiser": Average(stage.model, exponential(ema_decay))}
        self.averages |= {f"denoiser-{value}": average for value, average in self.power_averages.items()}
        self.forwards = {"denoiser": run.prepare(stage.model)}
        stage.model.denoiser.train()
        self.memory = stage.objective.density.memory
        self._newest: tuple[int, list[Drawn]] = -1, []

    @property
    def averaged(self) -> ConditionedDenoiser:
        """The model with averaged weights: what validation, export and evaluation use."""
        return cast(ConditionedDenoiser, self.averages["denoiser"].module)

    @property
    def networks(self) -> list[str]:
        """Image encoders that the stage looks through; see `ldm.models.provenance.Provenance`."""
        modules = (module for part in (*self.stage.space.networks, self.stage.model) for module in part.modules())
        encoders = [module for module in modules if isinstance(module, ImageEncoder)]
        return [trained_through("CLIP", weights_sha256(tower(encoder.network))) for encoder in encoders]

    @property
    def frozen(self) -> dict[str, str]:
        """Hashes of the space, its networks included, and of the networks and layers of the model that are frozen."""
        model = self.stage.model
        found = {"space": self.stage.space.key}
        if (image_layers := image_layers_hash(model.denoiser)) is not None:
            found["denoiser"] = image_layers
        for name in model.conditioners:
            conditioner = model.conditioner(name)
            if conditioner.frozen and conditioner.networks:
                found[f"conditioners.{name}"] = "-".join(map(network_hash, conditioner.networks))
        return found

    @property
    def frozen_networks(self) -> tuple[nn.Module, ...]:
        """The networks of the space; those of the conditioners are part of the model."""
        return self.stage.space.networks

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the captions, None without captions."""
        return getattr(dict(self.stage.model.conditioners.items()).get("text"), "tokenizer", None)

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``mean`` and ``std`` of x0 given images, (B, 3, H, W): what the cache keeps."""
        moments = self.stage.space.moments(pixel_values.to(self.run.device))
        return {"mean": moments.mean, "std": moments.std}

    def remember(self, images: CaptionedImages) -> None:
        """Keep what the frozen networks of the conditioners make of captions and images, and look it up from now on."""
        for name in self.stage.model.conditioners:
            self.stage.model.conditioner(name).remember(images)

    @property
    def asked(self) -> str | None:
        """The name of the conditioner whose condition a user asks for; None without one."""
        model = self.stage.model
        return next(
            (name for name in model.conditioners if model.conditioner(name).asks == self.condition.keyword), None
        )

    @cached_property
    def conditions(self) -> list[Condition]:
        """The conditions that a user asks for, the most specific first."""
        model = self.stage.model
        return conditions_of([model.conditioner(name).asks for name in model.conditioners])

    @cached_property
    def given_sizes(self) -> dict[str, int | None]:
        """The size of the images that a call takes for each condition, by keyword; None: any, or no images."""
        conditioners = [self.stage.model.conditioner(name) for name in self.stage.model.conditioners]
        asked = {one.asks: one.given_size for one in conditioners if one.asks is not None}
        return {one.keyword: asked.get(one.keyword) for one in self.conditions}

    @property
    def condition(self) -> Condition:
        """The first condition that a user asks for."""
        return self.conditions[0]

    def losses(self, batch: Batch, global_step: int) -> dict[str, Tensor]:
        """Return the mean loss; all noise and times come from the positions of the samples."""
        x0 = self.x0(batch)
        inputs, model = self.inputs(batch, x0), self.forwards["denoiser"]

        def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
            return cast(Tensor, model(x_t, timesteps, inputs))

        objective = self.stage.objective
        noise, levels = objective.draw(x0, generators(self.run.seed, batch.positions, "noise"))
        losses = objective.loss_at(predict, x0, noise, levels)
        before = self._newest[1] if self._newest[0] == global_step else []
        self._newest = global_step, [*before, (batch.positions, levels, losses.detach())]
        return {"denoiser": (objective.density.weight(levels).to(losses) * losses).mean()}

    def after_step(self) -> None:
        """Give the density the losses of the step just taken: those of all processes, in the order of the positions."""
        if not self.memory:
            return
        device = self.run.device
        positions = torch.cat([torch.tensor(positions, device=device) for positions, _, _ in self._newest[1]])
        levels = torch.cat([levels.to(device) for _, levels, _ in self._newest[1]])
        losses = torch.cat([losses for _, _, losses in self._newest[1]])
        positions, levels, losses = self.run.accelerator.gather((positions, levels, losses))
        order = positions.argsort()
        self.stage.objective.density.observe(levels[order], losses[order])

    def not_finite_at(self) -> list[float]:
        """Return the noise levels, in [0, 1], of this process's samples of the newest step whose loss is not finite."""
        return [
            level
            for _, levels, losses in self._newest[1]
            for level, finite in zip(levels.tolist(), losses.isfinite().tolist(), strict=True)
            if not finite
        ]

    def x0(self, batch: Batch) -> Tensor:
        """Return x0, sampled from the posterior, on the run's device."""
        if batch.moments is not None:
            moments = Moments(**{name: tensor.to(self.run.device) for name, tensor in batch.moments.items()})
        else:
            moments = self.stage.space.moments(cast(Tensor, batch.pixel_values).to(self.run.device))
        return moments.sample(generators(self.run.seed, batch.positions, "posterior"))

    def inputs(self, batch: Batch, x0: Tensor, dropped: bool | None = None) -> dict[str, Inputs]:
        """Return the inputs of each conditioner, on the run's device; the null where it is dropped.

        dropped: None, as in training: each conditioner drops its share of the samples, at random; False: none; True:
        all that training ever drops, which is what guidance compares with.
        """
        inputs = {}
        for name in self.stage.model.conditioners:
            conditioner = self.stage.model.conditioner(name)
            rate = conditioner.dropout if dropped is None else float(dropped and conditioner.dropout > 0)
            drops = [
                torch.rand((), generator=generator(self.run.seed, position, f"drop-{name}")).item() < rate
                for position in batch.positions
            ]
            draws = generators(self.run.seed, batch.positions, f"condition-{name}")
            tensors = conditioner.inputs(batch, x0, drops, draws)
            inputs[name] = {key: tensor.to(self.run.device) for key, tensor in tensors.items()}
        return inputs

    @torch.no_grad()
    def held_out_losses(self, batch: Batch, levels: Sequence[float], linear: bool = False) -> Tensor:
        """Return the loss of each sample at each noise level in (0, 1), with fixed noise: (L, B).

        The averaged model's; `linear`: that of `Objective.linear_output`, which has yet to learn what x0 looks like.
        """
        x0 = self.x0(batch)
        inputs = self.inputs(batch, x0, dropped=False)
        draws = generators(self.run.seed, batch.positions, "validation")
        noise = torch.stack([torch.randn(x0.shape[1:], generator=draw) for draw in draws]).to(x0)
        objective = self.stage.objective

        def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
            return cast(Tensor, self.averaged(x_t, timesteps, inputs))

        output = objective.linear_output if linear else predict
        return torch.stack([objective.loss_at(output, x0, noise, level) for level in levels])


class Autoencoding(nn.Module):
    """An autoencoder's whole pass behind one forward, so that every process sees the same graph."""

    def __init__(self, autoencoder: Autoencoder, config: ReconstructionConfig):
        super().__init__()
        self.autoencoder, self.config = autoencoder, config
        bottleneck_of(autoencoder).prepare(autoencoder)
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=config.learned_logvar)

    def forward(
        self, pixel_values: Tensor, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return what `Bottleneck.reconstruct` does, and the log-scale of the error, a scalar."""
        passed = bottleneck_of(self.autoencoder).reconstruct(self.autoencoder, pixel_values, noise, self.config)
        return *passed, self.logvar


class AutoencoderStep:
    """An autoencoder: encode, pass the bottleneck, decode, compare; with a discriminator if the config has one."""

    def __init__(self, autoencoder: Autoencoder, config: ReconstructionConfig, run: Run, ema_decay: float):
        self.run, self.config = run, config
        run.switch(autoencoder)
        module = Autoencoding(autoencoder, config).to(run.device).train()
        self.bottleneck = bottleneck_of(autoencoder)
        self.latent_channels = self.bottleneck.channels(autoencoder)
        self.factor = downsampling_factor(autoencoder)
        self.modules: dict[str, nn.Module] = {"autoencoder": module}
        self.averages = {"autoencoder": Average(module, exponential(ema_decay))}
        self.distance = None
        if config.perceptual != "none":
            self.distance = build_perceptual_distance(config.perceptual, config.lpips_weights).to(run.device)
        if config.adversarial != "none":
            if run.accelerator.mixed_precision == "fp16":
                raise ConfigError(
                    "loop.mixed_precision: fp16 scales one loss, reconstruction.adversarial needs two; use bf16 or no"
                )
            clips = isinstance(autoencoder, VideoAutoencoder)
            discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers, clips)
            self.modules["discriminator"] = discriminator.to(run.device).train()
        self.forwards = {name: run.prepare(module) for name, module in self.modules.items()}
        self.memory = {} if config.revive_after_steps is None else self.bottleneck.memory(autoencoder)
        self._newest: tuple[int, list[tuple[list[int], dict[str, Tensor]]]] = -1, []

    @property
    def averaged(self) -> Autoencoder:
        """The autoencoder with averaged weights."""
        return cast(Autoencoding, self.averages["autoencoder"].module).autoencoder

    @property
    def networks(self) -> list[str]:
        """The perceptual network, if there is one; see `ldm.models.provenance.Provenance`."""
        name = self.config.perceptual
        if self.distance is None:
            return []
        sha256 = EFFICIENTNETS[name] if name in EFFICIENTNETS else weights_sha256(self.distance.features)
        return [trained_through(name, sha256)]

    @property
    def frozen(self) -> dict[str, str]:
        """Hashes of the perceptual network, if there is one, and of the layers of images that are frozen."""
        found = {f"reconstruction.{self.config.perceptual}": name for name in self.networks}
        autoencoder = cast(Autoencoding, self.modules["autoencoder"]).autoencoder
        if (image_layers := image_layers_hash(autoencoder)) is not None:
            found["autoencoder"] = image_layers
        return found

    @property
    def frozen_networks(self) -> tuple[nn.Module, ...]:
        """The perceptual network, if there is one."""
        return () if self.distance is None else (self.distance,)

    tokenizer = None

    def not_finite_at(self) -> list[float]:
        """Return nothing: no noise is added."""
        return []

    def losses(self, batch: Batch, global_step: int) -> dict[str, Tensor]:
        """Return the autoencoder's loss, the discriminator's once it has started, and the terms of the first."""
        config = self.config
        pixel_values = time_last(cast(Tensor, batch.pixel_values).to(self.run.device))
        size = pixel_values.shape[-1] // self.factor
        draws = generators(self.run.seed, batch.positions, "posterior")
        shape = self.latent_channels, *pixel_values.shape[2:-2], size, size
        noise = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
        reconstruction, own, seen, scale = self.forwards["autoencoder"](pixel_values, noise.to(self.run.device))
        before = self._newest[1] if self._newest[0] == global_step else []
        self._newest = global_step, [*before, (batch.positions, seen)]
        terms = reconstruction_error(pixel_values, reconstruction, config, self.distance)
        likelihood = negative_log_likelihood(torch.stack([*terms.values()]).sum(), scale)
        own = {name: getattr(config, f"{name}_weight") * term for name, term in own.items()}
        loss = likelihood + torch.stack([*own.values()]).sum()
        terms |= own
        if config.adversarial == "none" or global_step < config.discriminator_start_step:
            return {"autoencoder": loss, **_detached(terms)}
        adversarial = generator_loss(config.adversarial, self._discriminator.frozen(reconstruction))
        weight: float | Tensor = config.adversarial_weight
        if config.adaptive:
            last_layer = last_weight(cast(Autoencoding, self.modules["autoencoder"]).autoencoder)
            weight = weight * adaptive_weight(likelihood, adversarial, last_layer, self._mean_over_processes)
        terms["adversarial"] = weight * adversarial
        images = torch.cat([pixel_values, reconstruction.detach().float()])
        real, reconstructed = self.forwards["discriminator"](images).chunk(2)
        return {
            "autoencoder": loss + terms["adversarial"],
            "discriminator": discriminator_loss(config.adversarial, real, reconstructed),
            **_detached(terms),
        }

    def forget(self) -> None:
        """Forget what was seen last: it was a rehearsal."""
        self._newest = -1, []

    def after_step(self) -> None:
        """Give the bottleneck what all processes have seen in the step just taken, in the order of the positions."""
        if not self.memory:
            return
        most_steps, (_, parts) = self.config.revive_after_steps, self._newest
        positions = torch.cat([torch.tensor(positions, device=self.run.device) for positions, _ in parts])
        seen = {name: torch.cat([tensors[name] for _, tensors in parts]) for name in parts[0][1]}
        positions, seen = self.run.accelerator.gather((positions, seen))
        order = positions.argsort()
        seen = {name: tensor[order] for name, tensor in seen.items()}
        trained = cast(Autoencoding, self.modules["autoencoder"]).autoencoder
        draw = generator(self.run.seed, int(positions.min()), "revival")
        self.bottleneck.after_step((trained, self.averaged), self.memory, seen, cast(int, most_steps), draw)

    @property
    def _discriminator(self) -> PatchDiscriminator:
        return cast(PatchDiscriminator, self.modules["discriminator"])

    def _mean_over_processes(self, gradient: Tensor) -> Tensor:
        return cast(Tensor, self.run.accelerator.reduce(gradient, reduction="mean"))


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}
