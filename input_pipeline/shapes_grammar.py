"""The language of the built-in data set: expressions that know what they mean.

An expression is a small tree. `evaluate(scene)` is its meaning, the set of objects that it describes, or None
where people could disagree: every geometric predicate has a grey zone between yes and no, and whatever
depends on an object in it is not admissible. `text()` is its wording. Surface words are kept in the tree and
explained by the tables below, so a new synonym is one table row.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Protocol

from input_pipeline.shapes_scene import COLOURS, SHAPES, TEXTURES, Scene, Thing

Meaning = frozenset[int] | None

SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
ANY_SHAPE = ("object", "shape", "thing")
ANYWHERE, LOW, MIDDLE, HIGH = "anywhere", "low", "middle", "high"
# Words before the noun -> what they ask of x and of y, and the same thing said after the noun.
PLACES = {
    "left": (LOW, ANYWHERE, "on the left"),
    "right": (HIGH, ANYWHERE, "on the right"),
    "top": (ANYWHERE, LOW, "at the top"),
    "bottom": (ANYWHERE, HIGH, "at the bottom"),
    "top left": (LOW, LOW, "in the top left"),
    "top right": (HIGH, LOW, "in the top right"),
    "bottom left": (LOW, HIGH, "in the bottom left"),
    "bottom right": (HIGH, HIGH, "in the bottom right"),
    "middle": (MIDDLE, MIDDLE, "in the middle"),
    "center": (MIDDLE, MIDDLE, "in the center"),
}
# Direction from which to count -> axis, sign, word for the first.
DIRECTIONS = {"left": ("x", 1, "leftmost"), "right": ("x", -1, "rightmost"), "top": ("y", 1, "highest")}
DIRECTIONS["bottom"] = ("y", -1, "lowest")
ORDINALS = ("first", "second", "third", "fourth")
SUPERLATIVES = {"largest": 1, "biggest": 1, "smallest": -1}
TOWARDS = {  # where the referent lies, seen from the other object
    "left of": (-1, 0),
    "to the left of": (-1, 0),
    "right of": (1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
    "under": (0, 1),
}
COMPARISONS = {"larger than": 1, "bigger than": 1, "smaller than": -1}
SAME_COLOUR = "the same color as"
NEAREST = ("closest to", "nearest to")

# Grey zones. Lengths are fractions of the image side.
SIDE_YES, SIDE_NO = (
    0.42,
    0.55,
)  # left: a centre below the one is, above the other is not, between them who knows
MIDDLE_YES, MIDDLE_NO = 0.11, 0.24  # distance from the image's middle, per axis
ORDER_GAP = 0.08  # between neighbours in a row
SIZE_RATIO = 1.25
TOWARDS_YES, TOWARDS_NO = 33.0, 66.0  # degrees off the named direction
TOWARDS_DISTANCE = 0.12
NEAREST_GAP = 0.07  # by which the nearest is nearer than the next, measured by centres and by borders


class Expression(Protocol):
    """A node of the tree."""

    def evaluate(self, scene: Scene) -> Meaning: ...

    def text(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Noun:
    """'small striped red ring': every object that has all the words; None leaves an attribute open."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    any_shape: str = "object"

    def evaluate(self, scene: Scene) -> Meaning:
        found = scene.everything
        for word in (SIZES.get(self.size), self.texture, self.colour, self.shape):
            if word:
                found = found & scene.having.get(word, frozenset())
        return found

    def text(self) -> str:
        words = (self.size, self.texture, self.colour, self.shape or self.any_shape)
        return " ".join(word for word in words if word)


@dataclasses.dataclass(frozen=True)
class Plural:
    """'all red stars': the several objects of a noun (generalised use only)."""

    noun: Noun

    def evaluate(self, scene: Scene) -> Meaning:
        return self.noun.evaluate(scene)

    def text(self) -> str:
        words = self.noun.text()
        return f"all {words}{'es' if words.endswith('s') else 's'}"


@dataclasses.dataclass(frozen=True)
class Article:
    """'the ...'."""

    inner: Expression

    def evaluate(self, scene: Scene) -> Meaning:
        return self.inner.evaluate(scene)

    def text(self) -> str:
        return f"the {self.inner.text()}"


@dataclasses.dataclass(frozen=True)
class Place:
    """'top left star' or 'star in the top left', optionally 'of the picture': by region of the image."""

    noun: Noun
    place: str
    after: str | None = None  # what follows the place when it stands behind the noun; None: it stands before

    def evaluate(self, scene: Scene) -> Meaning:
        return _those(self.noun.evaluate(scene), lambda i: is_at(scene.things[i], self.place))

    def text(self) -> str:
        if self.after is None:
            return f"{self.place} {self.noun.text()}"
        return f"{self.noun.text()} {PLACES[self.place][2]}{self.after}"


@dataclasses.dataclass(frozen=True)
class Order:
    """'second blue circle from the left', or 'leftmost blue circle' for the first."""

    noun: Noun
    rank: int  # counted from 1
    direction: str
    of: str = "from the"

    def evaluate(self, scene: Scene) -> Meaning:
        axis, sign, _ = DIRECTIONS[self.direction]
        row = sorted((sign * getattr(scene.things[i], axis), i) for i in self.noun.evaluate(scene))
        if len(row) < self.rank:
            return frozenset()
        for (a, _), (b, _) in itertools.pairwise(row[: self.rank + 1]):
            if b - a < ORDER_GAP:
                return None
        return frozenset([row[self.rank - 1][1]])

    def text(self) -> str:
        if self.rank == 1:
            return f"{DIRECTIONS[self.direction][2]} {self.noun.text()}"
        return f"{ORDINALS[self.rank - 1]} {self.noun.text()} {self.of} {self.direction}"


@dataclasses.dataclass(frozen=True)
class Superlative:
    """'largest green square': by diameter."""

    noun: Noun
    word: str

    def evaluate(self, scene: Scene) -> Meaning:
        sign = SUPERLATIVES[self.word]
        row = sorted((-sign * math.log(scene.things[i].diameter), i) for i in self.noun.evaluate(scene))
        if len(row) > 1 and row[1][0] - row[0][0] < math.log(SIZE_RATIO):
            return None
        return frozenset(i for _, i in row[:1])

    def text(self) -> str:
        return f"{self.word} {self.noun.text()}"


@dataclasses.dataclass(frozen=True)
class Relation:
    """'cross below the yellow ring': by comparison with one other object."""

    noun: Noun
    words: str
    anchor: Expression
    joint: str = ""  # 'that is', 'with', ... between the noun and the relation

    def evaluate(self, scene: Scene) -> Meaning:
        heads, anchor = self.noun.evaluate(scene), self.anchor.evaluate(scene)
        if anchor is None or len(anchor) != 1:
            return None
        (other,) = anchor
        return self._related(scene, heads - anchor, other)

    def _related(self, scene: Scene, heads: frozenset[int], other: int) -> Meaning:
        return _those(heads, lambda i: is_related(scene.things[i], self.words, scene.things[other]))

    def text(self) -> str:
        return " ".join(filter(None, (self.noun.text(), self.joint, self.words, self.anchor.text())))


class Nearest(Relation):
    """'star closest to the red ring'."""

    def _related(self, scene: Scene, heads: frozenset[int], other: int) -> Meaning:
        things, anchor = scene.things, scene.things[other]
        by_centre = {i: math.hypot(things[i].x - anchor.x, things[i].y - anchor.y) for i in heads}
        by_border = {i: distance - things[i].diameter / 2 for i, distance in by_centre.items()}
        winners = set()
        for distances in (by_centre, by_border):
            row = sorted(distances, key=distances.get)
            if len(row) > 1 and distances[row[1]] - distances[row[0]] < NEAREST_GAP:
                return None
            winners.update(row[:1])
        return frozenset(winners) if len(winners) < 2 else None


def _those(candidates: Meaning, test) -> Meaning:
    """The candidates that pass a yes / no / cannot say (None) test; None if it cannot say for one of them."""
    answers = {i: test(i) for i in candidates}
    if None in answers.values():
        return None
    return frozenset(i for i, yes in answers.items() if yes)


def _all_of(answers: tuple[bool | None, ...]) -> bool | None:
    if False in answers:
        return False
    return None if None in answers else True


def _grey(value: float, yes: float, no: float) -> bool | None:
    return True if value <= yes else False if value >= no else None


def _side(value: float, where: str) -> bool | None:
    if where == ANYWHERE:
        return True
    if where == MIDDLE:
        return _grey(abs(value - 0.5), MIDDLE_YES, MIDDLE_NO)
    return _grey(value if where == LOW else 1 - value, SIDE_YES, SIDE_NO)


def is_at(thing: Thing, place: str) -> bool | None:
    """Whether an object is at a place of `PLACES`; None in the grey zone."""
    horizontal, vertical, _ = PLACES[place]
    return _all_of((_side(thing.x, horizontal), _side(thing.y, vertical)))


def is_related(thing: Thing, words: str, other: Thing) -> bool | None:
    """Whether `thing` is 'left of', 'larger than', 'the same color as', ... `other`; None: cannot say."""
    if words == SAME_COLOUR:
        return thing.colour == other.colour
    if words in COMPARISONS:
        ratio = (thing.diameter / other.diameter) ** COMPARISONS[words]
        return _grey(-ratio, -SIZE_RATIO, -1 / SIZE_RATIO)
    ux, uy = TOWARDS[words]
    dx, dy = thing.x - other.x, thing.y - other.y
    off = math.degrees(math.atan2(abs(dx * uy - dy * ux), dx * ux + dy * uy))
    answer = _grey(off, TOWARDS_YES, TOWARDS_NO)
    return None if answer and math.hypot(dx, dy) < TOWARDS_DISTANCE else answer


def vocabulary() -> tuple[str, ...]:
    """Every word that the grammar can say, sorted; the tokenizer's vocabulary for this data set."""
    phrases = [
        *SIZES,
        *ANY_SHAPE,
        *SHAPES,
        *COLOURS,
        *TEXTURES,
        *SUPERLATIVES,
        *TOWARDS,
        *COMPARISONS,
        *NEAREST,
    ]
    phrases += [*PLACES, *(place[2] for place in PLACES.values()), *(name[2] for name in DIRECTIONS.values())]
    phrases += [*ORDINALS, SAME_COLOUR, "of the picture image from the that is with which has all"]
    phrases += [word + ("es" if word.endswith("s") else "s") for word in (*SHAPES, *ANY_SHAPE)]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))
