"""Pipelines to sample with, ours or stock, from a folder or the Hub."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from diffusers import DiffusionPipeline

from ldm.models.foreign import checked_pipeline


def load_pipeline(model: str, trust_remote_code: bool) -> Any:
    """Return the pipeline in folder or Hub repository `model`, ``user/name`` or ``user/name@revision``.

    As the stock class that ``model_index.json`` names, or with `trust_remote_code` as the folder's own
    ``pipeline.py``, which runs code that came with the model. Raises ValueError as `checked_pipeline`.
    """
    name, revision = checked_pipeline(model, trust_remote_code)
    own: dict[str, Any] = {}
    if trust_remote_code:
        own = {"custom_pipeline": name, "trust_remote_code": True, "custom_revision": revision.get("revision")}
    pipeline = DiffusionPipeline.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False, **revision, **own)
    pipeline.set_progress_bar_config(leave=False)
    return pipeline.to(PartialState().device)
