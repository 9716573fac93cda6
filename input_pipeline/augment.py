"""Random changes of training examples that keep the sentence true; off by default, as in the papers.

What happens to an example is a function of (seed, epoch, position) alone.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
from PIL import Image, ImageEnhance

from input_pipeline.records import DataError

_SIDES = {"left": "right", "lft": "rgt", "l": "r"}
_SIDES |= {other: side for side, other in _SIDES.items()} | {"rt": "left", "rite": "left"}
_ENDINGS = "(?:most|hand|handed|ward|wards|side|er|y|ie|ies|s)?"
_WORD = re.compile(
    rf"\b(?P<side>left|right|lft|rgt|rt|rite)(?P<ending>{_ENDINGS})\b|\b(?P<letter>[lr])\b", re.I
)
# Where 'right' and 'left' are no sides, or where turning the picture over turns more than them.
_NO_SIDE = re.compile(
    r"\bright\s+(?:above|below|behind|beside|under|underneath|beneath|over|next|in|on|at|by|near|after|before|up|down|"
    r"here|there|now|side\s+up|to\s+the\s+(?:left|right))\b|\b[lr][\s-]*shaped\b|\ball\s*right\b|\bleft\s*overs?\b|\bleft\s+(?:alone|behind)\b|"
    r"clock|\d\s*:\s*\d\d|\b(?:letters?|words?|text|numbers?|says|reads|reading|spells)\b",
    re.I,
)


def mirrored(text: str) -> str | None:
    """The sentence that is true of the mirrored picture; None where exchanging words does not give it."""
    if _NO_SIDE.search(text):
        return None

    def exchange(match: re.Match) -> str:
        found = match["side"] or match["letter"]
        word = _SIDES[found.lower()]
        if found.isupper() and len(found) > 1:
            word = word.upper()
        elif found[0].isupper():
            word = word.capitalize()
        return word + (match["ending"] or "")

    return _WORD.sub(exchange, text)


@dataclasses.dataclass(frozen=True)
class Draw:
    """What happens to one example: `crop` is (height, width, top, left) as shares, the latter two of the free room."""

    flip: bool
    factors: tuple[float, float, float]  # Brightness, contrast, saturation.
    crop: tuple[float, float, float, float] | None


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How often and how strongly examples are changed.

    flip: probability of a mirrored picture, with left and right exchanged in the sentence (not where that would be
    wrong); jitter: largest relative change of brightness, contrast and saturation, not of hue, since sentences name
    colours; crop: smallest share of a side that a random crop keeps (1: no crops), always with the whole referent. A
    crop can make words like 'leftmost' or 'in the corner' untrue.
    """

    flip: float = 0.0
    jitter: float = 0.0
    crop: float = 1.0

    def __post_init__(self):
        for field, lowest, highest in (("flip", 0, 1), ("jitter", 0, 0.99), ("crop", 0.05, 1)):
            value = getattr(self, field)
            if not lowest <= value <= highest:
                raise DataError(
                    f"config.data.augment.{field} is {value}; expected a number from {lowest} to {highest}"
                )

    def __bool__(self) -> bool:
        return bool(self.flip or self.jitter or self.crop < 1)

    def draw(self, seed: int, epoch: int, position: int) -> Draw:
        """The changes of the example at a position of an epoch."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, position, 2])))
        numbers = rng.random(8)  # The same ones whatever is switched on.
        factors = 1 + self.jitter * (2 * numbers[1:4] - 1)
        sides = self.crop + (1 - self.crop) * numbers[4:6]
        crop = (*map(float, sides), *map(float, numbers[6:8])) if self.crop < 1 else None
        return Draw(bool(numbers[0] < self.flip), tuple(map(float, factors)), crop)


def crop_box(draw: Draw, mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the crop of an image, which holds every pixel of the mask [H, W]."""
    box = []
    for axis, (share, place) in enumerate(zip(draw.crop[:2], draw.crop[2:], strict=True)):
        whole = mask.shape[axis]
        used = np.flatnonzero(mask.any(1 - axis))
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (whole, 0)
        side = max(round(share * whole), last - first, 1)
        lowest, highest = max(last - side, 0), min(first, whole - side)
        start = lowest + int(place * (highest - lowest + 1))
        box += [start, start + side]
    return tuple(box)


def apply(draw: Draw, image: Image.Image, mask: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """A picture and its mask uint8 [H, W], cropped and turned over."""
    if draw.crop is not None:
        top, bottom, left, right = crop_box(draw, mask)
        image, mask = image.crop((left, top, right, bottom)), mask[top:bottom, left:right]
    if draw.flip:
        image, mask = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask[:, ::-1]
    return image, mask


def jitter(draw: Draw, image: Image.Image) -> Image.Image:
    """A picture in other light."""
    for change, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), draw.factors, strict=True
    ):
        if factor != 1:
            image = change(image).enhance(factor)
    return image
