"""The built-in data set, judged by a second reader of its sentences that shares no code with the grammar."""

import math
import re

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from input_pipeline import shapes
from input_pipeline.records import DataError, load, splits
from input_pipeline.shapes_render import render
from input_pipeline.shapes_scene import COLOURS, SHAPES, TEXTURES, Dice, Scene, Thing, is_rare

SCENES = 60


@pytest.fixture(scope="module")
def examples():
    options = shapes.Options()
    return {s: [shapes.make_example(3, s, i, options) for i in range(SCENES)] for s in shapes.SCENES}


# A second reader: from text to the set of objects, by regular expressions and plain comparisons. `cut` in
# 0..1 says where in every grey zone it draws the line between yes and no; an admissible sentence means the
# same wherever that is.


def read(text: str, things: tuple[Thing, ...], cut: float) -> set[int]:
    text = text.removeprefix("the ")
    towards = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1), "under": (0, 1)}
    relation = re.fullmatch(
        r"(.*?) (?:(?:that|which) (?:is|has) |with )?(?:to the )?"
        r"(left of|right of|above|below|under|closest to|nearest to|larger than|bigger than|smaller than|"
        r"the same color as) the (?!picture|image)(.*)",
        text,
    )
    if relation:
        noun, word, anchor = relation.groups()
        (other,) = read(anchor, things, cut)
        heads = read(noun, things, cut) - {other}
        b = things[other]
        if word in ("closest to", "nearest to"):
            return {
                min(
                    heads,
                    key=lambda i: (
                        math.dist((things[i].x, things[i].y), (b.x, b.y)) - cut * things[i].diameter / 2
                    ),
                )
            }
        if word == "the same color as":
            return {i for i in heads if things[i].colour == b.colour}
        if word in ("larger than", "bigger than", "smaller than"):
            line = 0.81 + cut * (1.24 - 0.81)
            ratios = {i: things[i].diameter / b.diameter for i in heads}
            return {i for i, r in ratios.items() if (1 / r if word == "smaller than" else r) > line}
        ux, uy = towards[word]
        cosine = math.cos(math.radians(34 + cut * 31))
        found = set()
        for i in heads:
            dx, dy = things[i].x - b.x, things[i].y - b.y
            if (dx * ux + dy * uy) > cosine * math.hypot(dx, dy):
                found.add(i)
        return found
    where = re.fullmatch(
        r"(.*?) (?:on|at|in) the (left|right|top|bottom|middle|center|(?:top|bottom) (?:left|right))"
        r"(?: of the (?:picture|image))?",
        text,
    )
    if not where:
        before = re.fullmatch(r"((?:top |bottom )?(?:left|right)|top|bottom|middle|center) (.*)", text)
        where = before and re.match(r"(.*)\|(.*)", f"{before[2]}|{before[1]}")
    if where:
        noun, place = where.groups()
        side = 0.425 + cut * (0.545 - 0.425)
        near = 0.115 + cut * (0.235 - 0.115)
        tests = {
            "left": lambda t: t.x < side,
            "right": lambda t: t.x > 1 - side,
            "top": lambda t: t.y < side,
            "bottom": lambda t: t.y > 1 - side,
            "middle": lambda t: max(abs(t.x - 0.5), abs(t.y - 0.5)) < near,
            "center": lambda t: max(abs(t.x - 0.5), abs(t.y - 0.5)) < near,
        }
        return {i for i in read(noun, things, cut) if all(tests[word](things[i]) for word in place.split())}
    ordinal = re.fullmatch(r"(second|third|fourth) (.*) from (?:the )?(left|right|top|bottom)", text)
    ends = {"leftmost": "left", "rightmost": "right", "highest": "top", "lowest": "bottom"}
    first = text.split(" ", 1)
    if ordinal or first[0] in ends:
        rank, noun, side = ordinal.groups() if ordinal else ("first", first[1], ends[first[0]])
        members = sorted(
            read(noun, things, cut), key=lambda i: things[i].x if side in ("left", "right") else things[i].y
        )
        if side in ("right", "bottom"):
            members.reverse()
        return {members[("first", "second", "third", "fourth").index(rank)]}
    if first[0] in ("largest", "biggest", "smallest"):
        members = sorted(read(first[1], things, cut), key=lambda i: things[i].diameter)
        return {members[0 if first[0] == "smallest" else -1]}
    found = set(range(len(things)))
    for word in text.split():
        if word in ("small", "little"):
            found &= {i for i, t in enumerate(things) if t.diameter < 0.285}
        elif word in ("large", "big"):
            found &= {i for i, t in enumerate(things) if t.diameter > 0.285}
        elif word not in ("object", "shape", "thing"):
            assert word in (*SHAPES, *COLOURS, *TEXTURES), f"{word!r} in {text!r}"
            found &= {i for i, t in enumerate(things) if word in (t.shape, t.colour, t.texture)}
    return found


@pytest.mark.parametrize("cut", [0.0, 0.5, 1.0])
def test_every_sentence_means_exactly_its_object(examples, cut):
    for split, made in examples.items():
        for example in made:
            for objects, kind, text in example.expressions:
                assert read(text, example.scene.things, cut) == set(objects), (
                    split,
                    kind,
                    text,
                    example.scene,
                )


def test_types_name_the_words_that_decide(examples):
    """Without its place, order or superlative a sentence fits several objects: the word is needed."""
    for example in examples["train"]:
        for (target,), kind, text in example.expressions:
            words = text.removeprefix("the ").split()
            plain = [
                w for w in words if w in {*SHAPES, *COLOURS, *TEXTURES, "small", "little", "large", "big"}
            ]
            relation_free = kind != "relation"
            if kind == "attribute":
                assert len(read(text, example.scene.things, 0.5)) == 1
            elif relation_free:
                assert len(read(" ".join([*plain, "thing"]), example.scene.things, 0.5)) > 1, (target, text)


def test_types_are_balanced(examples):
    kinds = [kind for example in examples["train"] for _, kind, _ in example.expressions]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in shapes.TYPES}
    assert set(kinds) == set(shapes.TYPES)
    assert min(shares.values()) > 0.1, shares
    assert max(shares.values()) < 0.35, shares


def test_masks_show_the_objects(examples):
    """Centre, area and colour of the pixels under each mask: none transposed, shifted or swapped passes."""
    from input_pipeline.ops import open_image

    size, hues = 96, {"red": 0, "orange": 27, "yellow": 53, "green": 125, "blue": 220, "purple": 284}
    for example in examples["testA"]:
        image = np.asarray(open_image(example.png).convert("HSV")).astype(float)
        rles = [{"size": [size, size], "counts": c} for c in example.masks]
        masks = coco_mask.decode(rles)
        assert masks.sum(-1).max() <= 1  # visible pixels belong to one object
        for i, thing in enumerate(example.scene.things):
            alone = render(Scene((thing,)), size, Dice(0))[1][0]
            visible = masks[..., i]
            assert not (visible & ~alone.astype(bool)).any()
            assert 0.6 * alone.sum() <= visible.sum() <= math.pi / 4 * 1.3 * (thing.diameter * size) ** 2
            if visible.sum() == alone.sum() and thing.shape in ("circle", "square", "cross", "ring"):
                y, x = (np.nonzero(visible)[axis].mean() + 0.5 for axis in (0, 1))
                assert abs(x / size - thing.x) < 0.01
                assert abs(y / size - thing.y) < 0.01
            if thing.texture == "plain":
                hue = np.median(image[visible > 0][:, 0]) * 360 / 255
                assert abs((hue - hues[thing.colour] + 180) % 360 - 180) < 12, (thing, hue)


def test_enough_of_every_object_is_visible(examples):
    hidden = 0
    for example in [example for made in examples.values() for example in made]:
        areas = coco_mask.area([{"size": [96, 96], "counts": c} for c in example.masks])
        for thing, area in zip(example.scene.things, areas, strict=True):
            alone = render(Scene((thing,)), 96, Dice(0))[1].sum()
            assert 0.6 * alone <= area <= alone
            hidden += area < alone
    assert hidden > 30  # yet some are partly hidden


def test_rare_combinations_occur_in_the_rare_split_only(examples):
    seen = set()
    for split, made in examples.items():
        for example in made:
            combinations = [t.combination for t in example.scene.things]
            if split == "rare":
                assert all(is_rare(*combinations[i]) for objects, *_ in example.expressions for i in objects)
            else:
                assert not any(is_rare(*c) for c in combinations)
                seen.update(combinations)
    rare = [(s, c, t) for s in SHAPES for c in COLOURS for t in TEXTURES if is_rare(s, c, t)]
    assert len(rare) == 24
    for s, c, t in rare:  # their parts, in pairs, are known from training
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert any((k[a], k[b]) == ((s, c, t)[a], (s, c, t)[b]) for k in seen)


def test_splits_differ_as_documented(examples):
    counts = {split: [len(e.scene.things) for e in made] for split, made in examples.items()}
    assert set(counts["train"]) == set(range(3, 9))
    assert set(counts["testA"]) == {3, 4}
    assert min(counts["testB"]) >= 7
    assert max(counts["testB"]) > 8
    large = {
        s: np.mean([t.diameter > 0.3 for e in made for t in e.scene.things]) for s, made in examples.items()
    }
    assert large["testB"] < large["train"] < large["testA"]


def test_flavours():
    places = {"left", "right", "top", "bottom", "middle", "center", "above", "below", "under"}
    places |= {"leftmost", "rightmost", "highest", "lowest", "second", "third"}
    lengths = {}
    for flavour in ("refcoco", "refcoco+", "refcocog"):
        options = shapes.Options(flavour=flavour)
        texts = [t for i in range(25) for _, _, t in shapes.make_example(0, "val", i, options).expressions]
        used = {word for text in texts for word in text.split()}
        assert used & places if flavour != "refcoco+" else not used & places
        assert all(t.startswith("the ") == (flavour == "refcocog") for t in texts)
        lengths[flavour] = np.mean([len(t.split()) for t in texts])
    assert lengths["refcocog"] > 1.5 * lengths["refcoco"]


def test_vocabulary_is_what_is_said():
    said = set()
    for i in range(150):
        for split in ("train", "testB"):
            example = shapes.make_example(1, split, i, shapes.Options(generalised=True, expressions=4))
            for _, _, text in example.expressions:
                assert len(text.split()) <= 20
                assert len(text.split()) == len(text.split(" "))
                said.update(text.split())
    assert said <= set(shapes.vocabulary())
    # Ranks and plurals of every kind are too rare to appear in a few scenes.
    unsaid = {w for w in set(shapes.vocabulary()) - said if not w.endswith("s")}
    assert unsaid <= {"first", "fourth", "center", "middle"}
    assert list(shapes.vocabulary()) == sorted(set(shapes.vocabulary()))


def test_generalised_expressions():
    options = shapes.Options(generalised=True)
    kinds = {"no-target": 0, "several-targets": 0}
    for i in range(30):
        example = shapes.make_example(0, "val", i, options)
        for objects, kind, text in example.expressions:
            if kind in kinds:
                kinds[kind] += 1
                singular = re.sub(r"^all (.*?)s$", r"\1", text).replace("crosse", "cross")
                assert read(singular, example.scene.things, 0.5) == set(objects)
                assert len(objects) == 0 if kind == "no-target" else len(objects) > 1
    assert min(kinds.values()) > 15
    records = load("shapes", "val", scenes=5, generalised=True)
    nothing = [r for r in records if r.type == "no-target"]
    several = [r for r in records if r.type == "several-targets"]
    assert nothing
    assert all(r.segmentation == [] for r in nothing)
    # The union of the masks: as large as its disjoint parts together, within one picture.
    example = shapes.make_example(0, "val", several[0].image_id, options)
    objects = next(o for o, kind, _ in example.expressions if kind == "several-targets")
    parts = [coco_mask.area({"size": [96, 96], "counts": example.masks[i]}) for i in objects]
    assert coco_mask.area(several[0].segmentation) == sum(parts)


def test_examples_depend_on_seed_split_and_index_alone():
    options = shapes.Options()
    forwards = [shapes.make_example(5, "train", i, options) for i in range(4)]
    backwards = [shapes.make_example(5, "train", i, options) for i in reversed(range(4))][::-1]
    assert forwards == backwards
    others = [
        shapes.make_example(6, "train", 0, options),
        shapes.make_example(5, "val", 0, options),
        forwards[1],
    ]
    assert len({example.png for example in (forwards[0], *others)}) == 4


def same(a, b):
    return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))


def test_the_result_does_not_depend_on_processes_or_number(monkeypatch):
    monkeypatch.setattr(shapes, "_SCENES_PER_WORKER", 2)
    options = dict(seed=1, image_size=48, generalised=True)
    one = load("shapes", "train", scenes=7, workers=1, **options)
    assert same(one, load("shapes", "train", scenes=7, workers=3, **options))
    fewer = load("shapes", "train", scenes={"train": 3, "val": 9}, **options)
    assert same(one[: len(fewer)], fewer)


def test_the_cache_holds_the_same_and_heals_by_name(tmp_path):
    options = dict(seed=1, scenes=3, image_size=48, cache_dir=str(tmp_path / "new"))
    made = load("shapes", "val", **options)
    (path,) = (tmp_path / "new").iterdir()
    before = path.stat().st_mtime_ns
    assert same(made, load("shapes", "val", **options))
    assert path.stat().st_mtime_ns == before
    assert not same(made, load("shapes", "val", **(options | {"seed": 2})))
    assert len(list((tmp_path / "new").iterdir())) == 2
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path.name}.*delete it"):
        load("shapes", "val", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(flavour="refcoco*"), "flavour 'refcoco\\*' .*refcocog, mixed"),
        (dict(types=["place", "colour"]), "colour.*attribute, place"),
        (dict(types=["place"], flavour="refcoco+"), "none of the types"),
        (dict(min_objects=5, max_objects=4), "min_objects 5 and max_objects 4"),
        (dict(image_size=8), "image_size 8"),
        (dict(expressions=0), "expressions 0"),
        (dict(scenes=0), "scenes of split 'val' is 0"),
        (dict(seed=-1), "seed -1"),
        (dict(shade=1), "no option 'shade'; it has: .*image_size"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(DataError, match=words):
        load("shapes", "val", **options)


def test_crowded_scenes_and_single_types_end():
    """Rejection sampling must not run forever at the edges of what the options allow."""
    for changes in (
        dict(min_objects=10, max_objects=10),
        dict(min_objects=2, max_objects=2, types=("order",)),
        dict(types=("superlative",), flavour="refcoco+"),
    ):
        for split in splits("shapes"):
            example = shapes.make_example(0, split, 0, shapes.Options(**changes))
            assert {kind for _, kind, _ in example.expressions} <= set(changes.get("types", shapes.TYPES))
