"""Finds sentences for the objects of a scene: proposes expressions, keeps those that mean the right one."""

from __future__ import annotations

from collections.abc import Callable

from input_pipeline import shapes_grammar as grammar
from input_pipeline.shapes_grammar import Expression, Noun
from input_pipeline.shapes_scene import COLOURS, SHAPES, TEXTURES, Dice, Scene

TYPES = ("attribute", "place", "order", "superlative", "relation")
NO_TARGET, SEVERAL_TARGETS = "no-target", "several-targets"
# Flavour -> how often each type is tried first. The rarer a type succeeds the larger its weight, so that the
# outcome is balanced.
FLAVOURS = {
    "refcoco": {"attribute": 0.5, "place": 1.6, "order": 1.0, "superlative": 1.5, "relation": 0.8},
    "refcoco+": {"attribute": 0.8, "superlative": 2.0, "relation": 1.2},
    "refcocog": {"attribute": 0.5, "place": 1.2, "order": 0.8, "superlative": 1.0, "relation": 2.0},
}
MIXED = "mixed"
_TRIES = 5

_RELATIONS = {
    "refcoco": ("left of", "right of", "above", "below", "under", *grammar.NEAREST),
    "refcoco+": (*grammar.COMPARISONS, grammar.SAME_COLOUR, *grammar.NEAREST, *grammar.NEAREST),
    "refcocog": (
        *("to the left of", "to the right of", "above", "below", "under"),
        *("larger than", "smaller than", grammar.SAME_COLOUR, "closest to", "nearest to"),
    ),
}


class Describer:
    """Proposes expressions for the objects of one scene."""

    def __init__(self, scene: Scene, dice: Dice):
        self.scene, self.dice = scene, dice
        self._nouns: dict[int, tuple[dict[Noun, float], dict[Noun, float]]] = {}
        self._places: dict[int, list[str]] = {}

    def describe(self, target: int, kind: str, flavour: str) -> Expression | None:
        """An expression of one type and flavour that means exactly `target`, or None if none was found."""
        for _ in range(_TRIES):
            found = _PROPOSALS[kind](self, target, flavour)
            if found is not None and found.evaluate(self.scene) == {target}:
                return grammar.Article(found) if flavour == "refcocog" else found
        return None

    def nouns(self, target: int) -> tuple[dict[Noun, float], dict[Noun, float]]:
        """Nouns for the target alone, and nouns for it and others, where a further word must decide.

        Each with a weight: short ones are preferred, and such as name the shape, as people do.
        """
        if target not in self._nouns:
            thing = self.scene.things[target]
            alone: dict[Noun, float] = {}
            shared: dict[Noun, float] = {}
            for shape in (thing.shape, None):
                for colour in (thing.colour, None):
                    for texture in (thing.texture, None):
                        for size in (thing.size, None):
                            noun = Noun(shape, colour, texture, size)
                            weight = 0.45 ** (4 - (shape, colour, texture, size).count(None))
                            if texture == "plain":
                                weight *= 0.5
                            if shape:
                                weight *= 6
                            (alone if len(noun.evaluate(self.scene)) == 1 else shared)[noun] = weight
            self._nouns[target] = alone, shared
        return self._nouns[target]

    def said(self, noun: Noun) -> Noun:
        """The noun with a synonym for its size and for 'object'."""
        sizes = {"small": ("small", "little"), "large": ("large", "big")}
        size = self.dice.pick(sizes[noun.size]) if noun.size else None
        any_shape = self.dice.pick(grammar.ANY_SHAPE) if noun.shape is None else noun.any_shape
        return Noun(noun.shape, noun.colour, noun.texture, size, any_shape)

    def alone(self, target: int) -> Noun | None:
        """A noun for the target alone."""
        nouns = self.nouns(target)[0]
        return self.said(self.dice.weighted(nouns)) if nouns else None

    def shared(self, target: int, with_size: bool = True) -> Noun | None:
        """A noun for the target and others."""
        nouns = self.nouns(target)[1]
        if not with_size:
            nouns = {noun: weight for noun, weight in nouns.items() if not noun.size}
        return self.said(self.dice.weighted(nouns)) if nouns else None

    # One proposal per type; None where the scene has nothing to offer.

    def attribute(self, target: int, flavour: str) -> Expression | None:
        return self.alone(target)

    def place(self, target: int, flavour: str) -> Expression | None:
        noun = self.shared(target)
        thing = self.scene.things[target]
        if target not in self._places:
            self._places[target] = [place for place in grammar.PLACES if grammar.is_at(thing, place)]
        places = self._places[target]
        if noun is None or not places:
            return None
        place = self.dice.pick(places)
        if flavour == "refcocog":
            return grammar.Place(noun, place, self.dice.pick(("", " of the picture", " of the image")))
        return grammar.Place(noun, place, "" if self.dice.chance(0.3) else None)

    def order(self, target: int, flavour: str) -> Expression | None:
        noun = self.shared(target)
        if noun is None:
            return None
        members = noun.evaluate(self.scene)
        direction = self.dice.pick(tuple(grammar.DIRECTIONS))
        axis, sign, _ = grammar.DIRECTIONS[direction]
        ahead = {i: sign * getattr(self.scene.things[i], axis) for i in members}
        rank = 1 + sum(value < ahead[target] for value in ahead.values())
        # 'Second of two' is said from the other end.
        if rank > len(grammar.ORDINALS) or (rank > 1 and rank == len(members)):
            return None
        of = "from the" if flavour == "refcocog" else self.dice.pick(("from the", "from"))
        return grammar.Order(noun, rank, direction, of)

    def superlative(self, target: int, flavour: str) -> Expression | None:
        noun = self.shared(target, with_size=False)
        if noun is None:
            return None
        diameters = [self.scene.things[i].diameter for i in noun.evaluate(self.scene)]
        if self.scene.things[target].diameter == min(diameters):
            return grammar.Superlative(noun, "smallest")
        return grammar.Superlative(noun, self.dice.pick(("largest", "biggest")))

    def relation(self, target: int, flavour: str) -> Expression | None:
        noun = self.shared(target)
        other = self.dice.integer(0, len(self.scene.things) - 1)
        if noun is None or other == target:
            return None
        anchor = self.anchor(other, flavour)
        if anchor is None:
            return None
        anchor = grammar.Article(anchor)
        things = self.scene.things
        words = [
            word
            for word in _RELATIONS[flavour]
            if word in grammar.NEAREST or grammar.is_related(things[target], word, things[other])
        ]
        if not words:
            return None
        word = self.dice.pick(words)
        if word == grammar.SAME_COLOUR:
            if noun.colour:  # it would give the anchor's colour away
                return None
            return grammar.Relation(noun, word, anchor, "with" if flavour != "refcocog" else "that has")
        joint = self.dice.pick(("that is", "which is", "")) if flavour == "refcocog" else ""
        node = grammar.Nearest if word in grammar.NEAREST else grammar.Relation
        return node(noun, word, anchor, joint)

    def anchor(self, other: int, flavour: str) -> Expression | None:
        """The other object of a relation: a noun, in long sentences also 'largest ring' and the like."""
        if flavour == "refcocog" and self.dice.chance(0.25):
            anchor = self.dice.pick((self.place, self.superlative))(other, flavour)
            return anchor if anchor and anchor.evaluate(self.scene) == {other} else None
        return self.alone(other)

    # Generalised use.

    def nothing(self) -> Expression | None:
        """A noun that means nothing here, though nearly: one word of a noun for an object is exchanged."""
        thing = self.scene.things[self.dice.integer(0, len(self.scene.things) - 1)]
        words = dict(shape=thing.shape, colour=thing.colour, texture=None)
        if self.dice.chance(0.3):
            words["texture"] = thing.texture
        name = self.dice.pick([name for name, word in words.items() if word])
        words[name] = self.dice.pick({"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES}[name])
        noun = Noun(**words)
        return None if noun.evaluate(self.scene) else noun

    def several(self) -> Expression | None:
        """'all red stars' of two or more, but not everything."""
        nouns = self.nouns(self.dice.integer(0, len(self.scene.things) - 1))[1]
        nouns = [noun for noun in nouns if 2 <= len(noun.evaluate(self.scene)) < len(self.scene.things)]
        return grammar.Plural(self.said(self.dice.pick(nouns))) if nouns else None


_PROPOSALS: dict[str, Callable[[Describer, int, str], Expression | None]] = {
    kind: getattr(Describer, kind) for kind in TYPES
}


def able_flavours(flavour: str, types: tuple[str, ...]) -> tuple[str, ...]:
    """The flavours that `flavour` stands for, without those that have none of the types."""
    names = tuple(FLAVOURS) if flavour == MIXED else (flavour,)
    return tuple(name for name in names if FLAVOURS[name].keys() & set(types))


def describe_scene(
    scene: Scene, targets: list[int], flavour: str, types: tuple[str, ...], count: int, dice: Dice
) -> list[tuple[int, str, Expression]]:
    """Up to `count` different expressions per target, each of another type as far as the scene permits.

    Returns (target, type, expression) in the order of the targets.
    """
    describer = Describer(scene, dice)
    flavours = able_flavours(flavour, types)
    found = []
    for target in targets:
        texts: set[str] = set()
        used: dict[str, int] = dict.fromkeys(types, 0)
        for _ in range(count):
            spoken = dice.pick(flavours)
            weights = {k: w * 0.15 ** used[k] for k, w in FLAVOURS[spoken].items() if k in used}
            while weights:
                kind = dice.weighted(weights)
                expression = describer.describe(target, kind, spoken)
                if expression is not None and expression.text() not in texts:
                    texts.add(expression.text())
                    used[kind] += 1
                    found.append((target, kind, expression))
                    break
                del weights[kind]
    return found
