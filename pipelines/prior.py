"""The prior: from a text to the CLIP embedding of an image of it (Ramesh et al. 2022, section 2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, PriorTransformer, SchedulerMixin
from diffusers.utils import BaseOutput
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .cascade import prompt_image_embeds
from .sampling import StepCallback
from .source import Portable, single_file
from .stages import callback_steps, check_prior, text_embeds


@dataclass
class ImageEmbedsOutput(BaseOutput):  # type: ignore[misc]
    """The output of a prior."""

    image_embeds: torch.Tensor
    """Image embeddings (B, D), float32, as the CLIP computes them."""


class PriorPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """The pipeline of a prior: image embeddings of prompts.

    text_encoder: a CLIP's, as wide as the embeddings. prior: reads its hidden states, its text embedding and the mask.
    num_inference_steps, guidance_scale: those of a call that names none.
    """

    model_cpu_offload_seq = "text_encoder->prior"
    _stock: ClassVar[str | None] = None
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        prior: PriorTransformer,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_prior(prior, text_encoder, tokenizer)
        self.register_modules(prior=prior, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_candidates: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Return ``.image_embeds``, (B, D) float32, one for each prompt; ``(image_embeds,)`` if not `return_dict`.

        guidance_scale: up to 1 there is no guidance. It and the steps are by default those of the config.
        negative_prompt: one, or one for each prompt.
        num_candidates: samples for each prompt, of which the one most like the text's embedding is returned.
        generator: with a list, embedding i depends on generator i only. callback_on_step_end: gets ``latents``.
        ValueError for unusable inputs.
        """
        self._interrupt = False
        networks, settings = (self.prior, self.scheduler), (num_inference_steps, guidance_scale)
        after_step = callback_steps(self, callback_on_step_end)
        prompts = prompt, negative_prompt
        embeds = prompt_image_embeds(self, "", networks, prompts, settings, num_candidates, generator, after_step)
        self.maybe_free_model_hooks()
        return ImageEmbedsOutput(image_embeds=embeds) if return_dict else (embeds,)

    @torch.no_grad()
    def encode_prompt(self, prompt: str, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states, (1, L, D), of a prompt and of no prompt."""
        one, other = (text_embeds("prompt", [text], self) for text in (prompt, ""))
        return one.states, other.states
