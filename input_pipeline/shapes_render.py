"""Draws scenes of the built-in data set: antialiased outlines, four textures, patterned backgrounds."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
from PIL import Image, ImageDraw

from input_pipeline.shapes_scene import Dice, Scene, Thing

SUPERSAMPLING = 3
_HSV = {  # degrees, saturation, value
    "red": (356, 0.88, 0.86),
    "orange": (27, 0.95, 0.98),
    "yellow": (53, 0.88, 0.98),
    "green": (128, 0.78, 0.62),
    "blue": (220, 0.82, 0.88),
    "purple": (284, 0.68, 0.66),
}
_HUE_JITTER, _TONE_JITTER = 3.0, 0.06


def _turned(radius: float, corners: int, start: float = -90) -> list[complex]:
    return [
        radius * complex(math.cos(a), math.sin(a))
        for a in np.radians(start + np.arange(corners) * 360 / corners)
    ]


# Outlines in units of the radius, x + iy with y down; the ring is a circle with a hole.
_STAR = [point for pair in zip(_turned(1.12, 5), _turned(0.5, 5, -54), strict=True) for point in pair]
_ARM = 0.34
_QUARTER = [complex(_ARM, -_ARM), complex(_ARM, -1), complex(-_ARM, -1)]
_OUTLINES = {
    "circle": _turned(1.0, 40),
    "ring": _turned(1.0, 40),
    "square": _turned(0.87 * math.sqrt(2), 4, -45),
    "triangle": [complex(0, -1.02), complex(1.1, 0.85), complex(-1.1, 0.85)],
    "star": _STAR,
    "cross": [corner * turn for turn in (1, -1j, -1, 1j) for corner in _QUARTER],
}
_HOLE = 0.5


def render(scene: Scene, image_size: int, dice: Dice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paints a scene.

    Returns:
        image uint8 [S, S, 3]; disjoint masks of what is visible, uint8 [n, S, S]; visible shares float64 [n].
    """
    canvas = _background(image_size, dice)
    owner = np.full((image_size, image_size), -1, np.int16)
    whole = []
    for i, thing in enumerate(scene.things):
        rows, columns, fill, edge = _coverage(thing, image_size)
        window = canvas[rows, columns]
        first, second, dark = _palette(thing.colour, dice)
        pattern = _texture(thing, rows, columns, image_size, dice)
        paint = second + (first - second) * pattern[..., None]
        paint += (dark - paint) * (0.75 * edge)[..., None]
        window += (paint - window) * fill[..., None]
        inside = fill >= 0.5
        owner[rows, columns][inside] = i
        whole.append(np.count_nonzero(inside))
    masks = (owner == np.arange(len(scene.things), dtype=np.int16)[:, None, None]).astype(np.uint8)
    image = np.rint(canvas).astype(np.uint8)
    return image, masks, masks.sum((1, 2)) / np.maximum(whole, 1)


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 [H, W, 3] image, written for speed rather than size."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _coverage(thing: Thing, image_size: int) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """The window of an object, and there its coverage and that of its edge line, float32 in 0..1."""
    s, radius = SUPERSAMPLING, thing.diameter / 2 * image_size
    reach = math.ceil(1.25 * radius) + 1
    x, y = thing.x * image_size, thing.y * image_size
    left, top = max(int(x) - reach, 0), max(int(y) - reach, 0)
    right, bottom = min(int(x) + reach + 1, image_size), min(int(y) + reach + 1, image_size)
    size = (right - left) * s, (bottom - top) * s
    spin = radius * s * complex(math.cos(math.radians(thing.turn)), math.sin(math.radians(thing.turn)))
    # Pillow counts pixel centres as whole numbers, hence the half.
    origin = complex((x - left) * s - 0.5, (y - top) * s - 0.5)
    points = [origin + p * spin for p in _OUTLINES[thing.shape]]
    outline = [(p.real, p.imag) for p in points]
    fill, edge = Image.new("L", size), Image.new("L", size)
    pen, line = ImageDraw.Draw(fill), ImageDraw.Draw(edge)
    width = max(round(0.022 * image_size * s), 1)
    pen.polygon(outline, fill=255)
    joint = "curve" if len(outline) < 20 else None  # round corners; a circle has none worth the time
    line.line([*outline, *outline[:2]], fill=255, width=width, joint=joint)
    if thing.shape == "ring":
        inner = [(h.real, h.imag) for h in (origin + _HOLE * (p - origin) for p in points)]
        pen.polygon(inner, fill=0)
        line.line([*inner, *inner[:2]], fill=255, width=width)
    return (
        slice(top, bottom),
        slice(left, right),
        np.asarray(fill.reduce(s), np.float32) / 255,
        np.asarray(edge.reduce(s), np.float32) / 255,
    )


def _palette(colour: str, dice: Dice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An object's own colour, the second tone of its texture and its edge colour, float32 [3] in 0..255."""
    hue, saturation, value = _HSV[colour]
    hue += dice.uniform(-_HUE_JITTER, _HUE_JITTER)
    saturation = min(saturation + dice.uniform(-_TONE_JITTER, _TONE_JITTER), 1.0)
    value = min(value + dice.uniform(-_TONE_JITTER, _TONE_JITTER), 1.0)
    first = 255 * np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value), np.float32)
    # White would vanish in yellow; black is no hue, so it changes no colour.
    second = first * 0.25 if colour == "yellow" else first * 0.2 + 0.8 * 255
    return first, second.astype(np.float32), first * 0.3


def _texture(thing: Thing, rows: slice, columns: slice, image_size: int, dice: Dice) -> np.ndarray:
    """Where an object has its own colour (1) or the second tone of its texture (0), float32 [h, w]."""
    period = min(max(0.3 * thing.diameter, 0.078), 0.1)
    angle, phase = dice.uniform(0, math.pi), dice.uniform(0, 1)
    y = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) / image_size - thing.y)[:, None]
    x = ((np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) / image_size - thing.x)[None]
    if thing.texture == "plain":
        return np.ones((y.size, x.size), np.float32)
    if thing.texture != "striped":
        angle = math.radians(thing.turn if thing.shape in ("square", "cross", "triangle") else 0)
    turn = 2 * math.pi / period
    u = turn * (x * math.cos(angle) + y * math.sin(angle))
    v = turn * (y * math.cos(angle) - x * math.sin(angle))
    sharp = 0.5 * image_size * period / math.pi  # about one pixel from one tone to the other
    if thing.texture == "striped":
        wave = np.sin(u + 2 * math.pi * phase) + 0.15
    elif thing.texture == "checked":
        wave = 1.4 * np.sin(0.8 * u) * np.sin(0.8 * v)
    else:
        wave = 0.75 - np.cos(u) - np.cos(v)
    return np.clip(0.5 + 0.7 * sharp * wave, 0, 1)


def _background(image_size: int, dice: Dice) -> np.ndarray:
    """A greyish backdrop with blotches, waves or planks and a little grain; float32 [S, S, 3] in 0..255."""
    rng = np.random.Generator(np.random.PCG64(int(dice.random() * 2**53)))
    hue, saturation, value = dice.random(), dice.uniform(0.02, 0.16), dice.uniform(0.38, 0.8)
    base = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)
    kind = dice.pick(("blotches", "waves", "planks", "gradient"))
    side = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    angle = dice.uniform(0, 2 * math.pi)
    if kind == "blotches":
        cells = rng.random((dice.integer(4, 9),) * 2, dtype=np.float32)
        tone = np.asarray(Image.fromarray(cells).resize((image_size, image_size), Image.Resampling.BICUBIC))
        tone = 2 * tone - 1
    else:
        ramp = side * math.cos(angle) + (side * math.sin(angle))[:, None]
        if kind == "gradient":
            tone = 1.6 * (ramp - ramp.mean())
        elif kind == "waves":
            wobble = np.sin(2 * math.pi * dice.uniform(1, 3) * side)[:, None] * dice.uniform(0, 0.1)
            tone = 0.7 * np.sin(2 * math.pi * dice.uniform(3, 8) * (ramp + wobble))
        else:
            tone = 2 * (ramp * dice.uniform(3, 6) % 1) - 1
    grain = rng.random((image_size, image_size), dtype=np.float32) - 0.5
    brightness = 1 + dice.uniform(0.06, 0.16) * tone + 0.05 * grain
    return np.clip(base * brightness[..., None], 0, 255)
