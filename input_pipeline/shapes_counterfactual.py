"""Pairs of sentences that differ in one word and mean different objects: does a network listen to that word?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from input_pipeline import shapes_grammar as grammar
from input_pipeline.shapes_grammar import Expression, Noun, Order, Place, Relation, Superlative
from input_pipeline.shapes_scene import COLOURS, SHAPES, TEXTURES, Dice, Scene

# What may stand in place of a field's value, by node and field, and how the word is called.
_EXCHANGES: Mapping[type, Mapping[str, tuple[str, tuple]]] = {
    Noun: {
        "shape": ("shape", SHAPES),
        "colour": ("color", COLOURS),
        "texture": ("texture", TEXTURES),
        "size": ("size", tuple(grammar.SIZES)),
    },
    Place: {"place": ("place", tuple(grammar.PLACES))},
    Order: {
        "direction": ("direction", tuple(grammar.DIRECTIONS)),
        "rank": ("rank", tuple(range(1, len(grammar.ORDINALS) + 1))),
    },
    Superlative: {"word": ("superlative", tuple(grammar.SUPERLATIVES))},
    Relation: {"words": ("relation", (*grammar.TOWARDS, *grammar.COMPARISONS))},
}
WORDS = tuple(name for fields in _EXCHANGES.values() for name, _ in fields.values())


def exchanged(expression: Expression) -> Iterator[tuple[str, Expression]]:
    """All expressions that differ from one in a word, each with what the word says (one of `WORDS`)."""
    words = expression.text().split()
    for name, other in _variants(expression):
        others = other.text().split()
        if len(others) == len(words) and sum(a != b for a, b in zip(words, others, strict=True)) == 1:
            yield name, other


def _variants(node: Expression) -> Iterator[tuple[str, Expression]]:
    """The tree with one field of one node exchanged."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            for name, inner in _variants(value):
                yield name, dataclasses.replace(node, **{field.name: inner})
        name, values = _EXCHANGES.get(type(node), {}).get(field.name, ("", ()))
        for other in values if value is not None else ():
            if other != value:
                yield name, dataclasses.replace(node, **{field.name: other})


# How often a word is taken where another could be, so that all kinds occur: the fewer chances, the larger.
_WEIGHTS = dict.fromkeys(WORDS, 1.0) | {"relation": 30.0, "superlative": 3.0, "rank": 2.0, "shape": 0.5}


def pairs(
    scene: Scene, expressions: list[tuple[int, str, Expression]], dice: Dice
) -> list[tuple[int, str, Expression]]:
    """For each object that has one, an expression and a counterpart that means another, one after the other.

    `expressions` are (target, type, expression), several for an object to choose from. Of the result the types are the kind
    of the word that differs.
    """
    choices: dict[int, dict[str, list]] = {}
    for target, _, expression in expressions:
        for word, other in exchanged(expression):
            meaning = other.evaluate(scene)
            if meaning is not None and len(meaning) == 1 and meaning != {target}:
                by_word = choices.setdefault(target, {})
                by_word.setdefault(word, []).append((expression, *meaning, other))
    found = []
    for target, by_word in choices.items():
        word = dice.weighted({word: _WEIGHTS[word] for word in sorted(by_word)})
        expression, referent, other = dice.pick(by_word[word])
        found += [(target, word, expression), (referent, word, other)]
    return found
