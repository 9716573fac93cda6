"""Scenes of the built-in data set: what is where, before any pixel or word (data spec section 5).

Coordinates are fractions of the image side, x to the right and y down.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
TEXTURES = ("plain", "striped", "dotted", "checked")
# Diameters; between the two ranges no object exists, so nobody wonders whether one is small.
SMALL = (0.19, 0.25)
LARGE = (0.32, 0.42)
# Degrees: a square turned by 45 is a diamond, a cross a letter x.
MAX_TURN = {"circle": 180, "square": 12, "triangle": 18, "star": 36, "ring": 180, "cross": 12}
EDGE = 0.015  # free space between an object and the border of the image


class Dice:
    """Random choices from `random.random()` alone, the one stream that Python promises never to change."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return low + int((high - low + 1) * self.random())

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(len(items) * self.random())]

    def weighted(self, weights: dict[T, float]) -> T:
        rest = self.random() * sum(weights.values())
        for item, weight in weights.items():
            rest -= weight
            if rest < 0:
                return item
        return item

    def shuffled(self, items: Sequence[T]) -> list[T]:
        keys = [self.random() for _ in items]
        return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: its attributes, diameter, centre and turn (degrees)."""

    shape: str
    colour: str
    texture: str
    diameter: float
    x: float
    y: float
    turn: float

    @property
    def size(self) -> str:
        return "small" if self.diameter <= SMALL[1] else "large"

    @property
    def combination(self) -> tuple[str, str, str]:
        return self.shape, self.colour, self.texture


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in the order in which they are painted: a later one hides an earlier one."""

    things: tuple[Thing, ...]

    @functools.cached_property
    def having(self) -> dict[str, frozenset[int]]:
        """Attribute word -> indices of the objects that have it."""
        found: dict[str, set[int]] = {}
        for i, thing in enumerate(self.things):
            for word in (thing.size, *thing.combination):
                found.setdefault(word, set()).add(i)
        return {word: frozenset(indices) for word, indices in found.items()}

    @functools.cached_property
    def everything(self) -> frozenset[int]:
        return frozenset(range(len(self.things)))


def is_rare(shape: str, colour: str, texture: str) -> bool:
    """Whether a combination is kept for the rare split: 24 of 144; every pair of attributes is trained."""
    return (SHAPES.index(shape) + COLOURS.index(colour) + TEXTURES.index(texture)) % 6 == 0


@dataclasses.dataclass(frozen=True)
class Profile:
    """What distinguishes the scenes of one split.

    `large` is the share of large objects, `rare` that of objects with a combination kept from training.
    """

    min_objects: int
    max_objects: int
    large: float
    rare: float = 0.0


def sample_scene(profile: Profile, dice: Dice) -> Scene:
    """A random scene; objects repeat others' colours and shapes, or a single word would do too often."""
    while True:
        count = dice.integer(profile.min_objects, profile.max_objects)
        spacing = (
            1.02 if dice.chance(0.5) else dice.uniform(0.6, 0.9)
        )  # of the sum of radii: apart, or overlapping
        things: list[Thing] = []
        for _ in range(count):
            thing = _place(_attributes(profile, things, dice), profile, things, spacing, dice)
            if thing is not None:
                things.append(thing)
        enough = len(things) >= profile.min_objects
        if enough and (not profile.rare or any(is_rare(*thing.combination) for thing in things)):
            return Scene(tuple(things))


def _attributes(profile: Profile, things: list[Thing], dice: Dice) -> tuple[str, str, str]:
    rare = bool(profile.rare) and dice.chance(profile.rare)
    while True:
        shape, colour = dice.pick(SHAPES), dice.pick(COLOURS)
        texture = dice.weighted({"plain": 0.46, "striped": 0.18, "dotted": 0.18, "checked": 0.18})
        if things:
            other = dice.pick(things)
            how = dice.random()
            if how < 0.3:
                shape = other.shape
            elif how < 0.5:
                colour = other.colour
            elif how < 0.65:
                shape, colour = other.shape, other.colour
            elif how < 0.75:
                shape, colour, texture = other.combination
        if is_rare(shape, colour, texture) == rare:
            return shape, colour, texture


def _place(
    attributes: tuple[str, str, str], profile: Profile, things: list[Thing], spacing: float, dice: Dice
) -> Thing | None:
    large = dice.chance(profile.large)
    for attempt in range(60):
        # A crowded picture may have room for a small one only.
        diameter = dice.uniform(*(LARGE if large and attempt < 30 else SMALL))
        reach = diameter / 2 * 1.15 + EDGE
        x, y = dice.uniform(reach, 1 - reach), dice.uniform(reach, 1 - reach)
        if all(math.hypot(x - t.x, y - t.y) >= spacing * (diameter + t.diameter) / 2 for t in things):
            turn = MAX_TURN[attributes[0]]
            return Thing(*attributes, diameter, x, y, dice.uniform(-turn, turn))
    return None
