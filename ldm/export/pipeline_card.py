"""The card texts of a diffusion stage, by the kind of pipeline that it is saved as."""

from __future__ import annotations

from collections.abc import Mapping

from ldm.config import StageConfig
from ldm.export.card import CardText
from ldm.export.kinds import PipelineKind

SAMPLES_IMAGES = "A diffusion model in {space} space that samples images of {size} x {size} pixels {sampled}."
IMAGE = """\
image = pipe({call}).images[0]
image.save("image.png")"""
WORDS: Mapping[str, Mapping[str, str]] = {
    "prompt": {
        "title": "Text to image",
        "sampled": "from captions",
        "call": '"a cat", num_inference_steps={steps}, guidance_scale={guidance}',
        "seeds": "guidance {guidance} and seeds",
        "sheet": "Captions of the validation split",
    },
    "class_labels": {
        "title": "Images of classes",
        "sampled": "of classes, which have numbers",
        "call": "class_labels=[0], num_inference_steps={steps}, guidance_scale={guidance}",
        "seeds": "guidance {guidance} and seeds",
        "sheet": "Classes of images of the validation split",
    },
    "batch_size": {
        "title": "Images from noise",
        "sampled": "like those that it was trained on",
        "call": "batch_size=1, num_inference_steps={steps}",
        "seeds": "seeds",
        "sheet": "Some images, which are not related to the true ones beneath them",
    },
    "video": {
        "title": "Text to video",
        "about": "A latent diffusion model that samples clips of {size} x {size} pixels from captions.",
        "call": '"a cat", num_inference_steps={steps}, guidance_scale={guidance}',
        "use": "from diffusers.utils import export_to_gif\n\nframes = pipe({call}).frames[0]\n"
        'export_to_gif(frames, "clip.gif", fps=8)',
        "own": "subject, by the middle frames of its clips,",
        "among": "subjects",
        "one": "middle frame of the generated clip",
        "seeds": "guidance {guidance} and seeds",
        "sheet": "Captions of clips of the validation split, the frames side by side",
    },
    "prior": {
        "title": "Prior",
        "about": "A prior: it predicts the CLIP embedding of an image from a caption, for the decoder of unCLIP.",
        "call": '"a cat", num_inference_steps={steps}, guidance_scale={guidance}',
        "use": "image_embeds = pipe({call}).image_embeds",
        "one": "predicted embedding",
        "seeds": "guidance {guidance} and seeds",
        "sheet": "The true images nearest to the embeddings predicted from captions of the validation split",
    },
    "decoder": {
        "title": "Decoder of image embeddings",
        "sampled": "from CLIP embeddings of images, and captions",
        "call": '"a cat", image=Image.open("cat.png"), num_inference_steps={steps}, guidance_scale={guidance}',
        "use": f"from PIL import Image\n\n{IMAGE}",
        "seeds": "guidance {guidance} and seeds",
        "sheet": "Captions and embeddings of images of the validation split",
    },
    "latent_decoder": {
        "title": "Decoder of image embeddings",
        "sampled": "from CLIP embeddings of images",
        "call": 'Image.open("cat.png"), num_inference_steps={steps}, guidance_scale={guidance}',
        "use": f"from PIL import Image\n\n{IMAGE}",
        "seeds": "guidance {guidance} and seeds",
        "sheet": "Embeddings of images of the validation split",
    },
    "super_resolution": {
        "title": "Super-resolution",
        "sampled": "from captions and smaller images",
        "call": '"a cat", image=Image.open("small.png"), num_inference_steps={steps}, guidance_scale={guidance}',
        "use": f"from PIL import Image\n\n{IMAGE}",
        "seeds": "guidance {guidance} and seeds",
        "sheet": "Captions and images of the validation split, made small and large again",
    },
    "upsampler": {
        "title": "Upsampler",
        "sampled": "from smaller ones",
        "call": 'Image.open("small.png"), num_inference_steps={steps}',
        "use": f"from PIL import Image\n\n{IMAGE}",
        "seeds": "seeds",
        "sheet": "Images of the validation split, made small and large again",
    },
}
"""Texts for each kind of pipeline, by `PipelineKind.words`, or `PipelineKind.asks`."""
SNIPPET = """\
```python
from diffusers import DiffusionPipeline

model = "model"
pipe = DiffusionPipeline.from_pretrained({arguments})
{use}
```
"""
SHEET = """\
![generated images over true images of the validation split](samples.png)

*{sheet}, at most {count}: generated in {steps} steps with {seeds} from {seed} on, over the
true images, which were not trained on.*"""
MEASURED = """\
the loss on validation images, at most {loss_images}, none of them trained on, with the same noise each time, at several
noise levels (0: image, 1: noise) and as their mean."""
RETRIEVAL = """\
Retrieval: the share of {count} validation captions, sampled in the same way, whose {own} is the nearest to the
{sampled} (R@1) or among the five nearest (R@5), of all {among} of the data."""


def pipeline_card(kind: PipelineKind, config: StageConfig, ranked: int) -> CardText:
    """Return the card texts of a stage that is saved as a pipeline of this kind.

    ranked: number of validation captions that R@k is measured on.
    """
    looked, words = config.validation, WORDS[kind.words or kind.asks]
    values = {"steps": looked.num_inference_steps, "guidance": looked.guidance_scale}
    seeds = words["seeds"].format(**values)
    return CardText(
        title=words["title"],
        about=words.get("about", SAMPLES_IMAGES).format(
            space=kind.space, size=config.sampled_size, sampled=words.get("sampled")
        ),
        sheet=SHEET.format(
            sheet=words["sheet"], count=looked.num_images, steps=values["steps"], seeds=seeds, seed=config.seed
        ),
        sheets="samples",
        loading=_loading(kind, config, words.get("use", IMAGE), words["call"].format(**values)),
        measured=MEASURED.format(loss_images=looked.loss_images),
        notes={
            "r_at_1": RETRIEVAL.format(
                count=ranked,
                own=words.get("own", "own image"),
                sampled=words.get("one", "generated one"),
                among=words.get("among", "distinct images"),
            )
        },
        task=kind.task,
        pipeline_tag=kind.task,
        tags=(kind.task, f"{kind.space}-diffusion"),
    )


def _loading(kind: PipelineKind, config: StageConfig, use: str, call: str) -> str:
    """Return the instructions to load it: with diffusers alone, if that samples it, and with its own pipeline."""

    def snippet(arguments: str, more: str = "") -> str:
        return SNIPPET.format(arguments=arguments, use=use.format(call=call + more))

    own = "With its own pipeline, `pipeline.py`, which checks its inputs:\n\n" + snippet(
        "model, custom_pipeline=model, trust_remote_code=True"
    )
    if kind.stock_images(config) == "none":
        return own
    text = config.conditioners.text
    more = kind.stock_arguments.format(max_length=text.max_length if text else None)
    note = kind.stock_others.get(config.sampler.kind, kind.stock_note)
    return f"With diffusers alone{note}:\n\n{snippet('model', more)}\n{own}"
