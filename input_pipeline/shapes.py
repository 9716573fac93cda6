"""The built-in data set: pictures of shapes and sentences that mean one of them (data spec section 5).

Nothing to download; every example is a function of (seed, split, index) alone. Splits: `train` and `val` of
one distribution; `testA` few and large objects; `testB` crowded with small ones; `rare` with referents whose
combination of shape, colour and texture occurs in no other split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping

import numpy as np
from pycocotools import mask as coco_mask

from input_pipeline import shapes_counterfactual, shapes_describe, shapes_grammar
from input_pipeline.records import Blobs, DataError, Records, RleMasks, source
from input_pipeline.shapes_describe import FLAVOURS, MIXED, NO_TARGET, SEVERAL_TARGETS, TYPES, Describer
from input_pipeline.shapes_render import encode_png, render
from input_pipeline.shapes_scene import Dice, Profile, Scene, is_rare, sample_scene

VERSION = 2  # of the generator; raise it with any change of what it makes: caches of older data are not used
SCENES = {"train": 10000, "val": 500, "testA": 500, "testB": 500, "rare": 500}
MIN_VISIBLE = 0.6
vocabulary = shapes_grammar.vocabulary
_CANDIDATES, _RELATIONS = 4, 16  # Of expressions, and of relations beside them, to find counterparts for.
_SCENES_PER_WORKER = 500  # fewer are made faster than a process starts


@dataclasses.dataclass(frozen=True)
class Options:
    """What the scenes and sentences are like.

    `types` limits the expression types; `expressions` is the number per object; `generalised` adds to every
    scene one expression without and, where possible, one with several referents; `counterfactual` makes pairs of
    expressions, one after the other, that differ in one word and mean different objects.
    """

    image_size: int = 96
    min_objects: int = 3
    max_objects: int = 8
    flavour: str = MIXED
    types: tuple[str, ...] = TYPES
    expressions: int = 2
    generalised: bool = False
    counterfactual: bool = False

    def __post_init__(self):
        if self.flavour not in (*FLAVOURS, MIXED):
            raise DataError(f"shapes: flavour {self.flavour!r} is none of {', '.join((*FLAVOURS, MIXED))}")
        unknown = sorted(set(self.types) - set(TYPES))
        if unknown or not self.types:
            raise DataError(f"shapes: types {list(self.types)} must be some of {', '.join(TYPES)}")
        if not shapes_describe.able_flavours(self.flavour, self.types):
            known = ", ".join(FLAVOURS[self.flavour])
            raise DataError(
                f"shapes: flavour {self.flavour!r} has none of the types {list(self.types)}; it has {known}"
            )
        if not 2 <= self.min_objects <= self.max_objects <= 10:
            raise DataError(
                f"shapes: min_objects {self.min_objects} and max_objects {self.max_objects} must be in order"
                " and in 2..10"
            )
        if self.image_size < 32:
            raise DataError(
                f"shapes: image_size {self.image_size} is too small to recognise shapes, take 32 or more"
            )
        if self.generalised and self.counterfactual:
            raise DataError("shapes: generalised and counterfactual exclude each other, set one of them")
        if self.expressions < 1:
            raise DataError(f"shapes: expressions {self.expressions} must be at least 1")

    @property
    def per_object(self) -> int:
        """Expressions to find for an object; many of those to be made pairs of have no counterpart."""
        return _CANDIDATES * self.expressions if self.counterfactual else self.expressions

    def profile(self, split: str) -> Profile:
        if split == "testA":
            return Profile(self.min_objects, min(self.min_objects + 1, self.max_objects), large=0.9)
        if split == "testB":
            return Profile(max(self.min_objects, self.max_objects - 1), self.max_objects + 2, large=0.15)
        return Profile(self.min_objects, self.max_objects, large=0.5, rare=0.5 if split == "rare" else 0)


@dataclasses.dataclass(frozen=True)
class Example:
    """One scene: picture (PNG), masks (RLE counts per object), expressions (objects, type, text)."""

    scene: Scene
    png: bytes
    masks: list[bytes]
    expressions: list[tuple[tuple[int, ...], str, str]]


def make_example(seed: int, split: str, index: int, options: Options) -> Example:
    """Makes one scene; depends on nothing but its arguments."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(split.encode()), index]).generate_state(4, np.uint64)
    sketch, paint, speech, extra = (Dice(int(word)) for word in entropy)
    profile = options.profile(split)
    while True:
        scene = sample_scene(profile, sketch)
        image, masks, visible = render(scene, options.image_size, paint)
        if visible.min() < MIN_VISIBLE:
            continue
        targets = [i for i, t in enumerate(scene.things) if not profile.rare or is_rare(*t.combination)]
        found = shapes_describe.describe_scene(
            scene, targets, options.flavour, options.types, options.per_object, speech
        )
        if options.counterfactual:
            if "relation" in options.types:  # Which are seldom true of another object with another word.
                found += shapes_describe.describe_scene(
                    scene, targets, options.flavour, ("relation",), _RELATIONS * options.expressions, speech
                )
            found = shapes_counterfactual.pairs(scene, found, extra)
        if found:
            break
    expressions = [((target,), kind, expression.text()) for target, kind, expression in found]
    if options.generalised:
        describer = Describer(scene, extra)
        for kind, propose in ((NO_TARGET, describer.nothing), (SEVERAL_TARGETS, describer.several)):
            expression = next(filter(None, (propose() for _ in range(20))), None)
            if expression is not None:
                expressions.append((tuple(sorted(expression.evaluate(scene))), kind, expression.text()))
    counts = [rle["counts"] for rle in coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))]
    return Example(scene, encode_png(image), counts, expressions)


def splits(**options) -> tuple[str, ...]:
    """Names of the splits."""
    return tuple(SCENES)


@source("shapes", splits)
def load(
    split: str,
    *,
    root: str = "",
    seed: int = 0,
    scenes: int | Mapping[str, int] | None = None,
    cache_dir: str | None = None,
    workers: int | None = None,
    **options,
) -> Records:
    """Makes one split.

    Args:
        root: not used, nothing is read.
        scenes: number of scenes of this split, or a mapping of split to number; None or a missing split:
            `SCENES`.
        cache_dir: where to keep what was made, one file per split and choice of options; None: nowhere.
        workers: processes; None: one per core. The result does not depend on it.
        **options: fields of `Options`.
    Raises:
        DataError: for an unknown or impossible option.
    """
    del root
    names = [field.name for field in dataclasses.fields(Options)]
    for name in options:
        if name not in names:
            known = ", ".join(["scenes", "cache_dir", "workers", *names])
            raise DataError(f"data source 'shapes' has no option {name!r}; it has: {known}")
    if "types" in options:
        options["types"] = tuple(options["types"])
    made_of = Options(**options)
    if isinstance(scenes, Mapping):
        scenes = scenes.get(split)
    count = SCENES[split] if scenes is None else int(scenes)
    if count < 1:
        raise DataError(f"shapes: scenes of split {split!r} is {count}, it must be at least 1")
    if seed < 0:
        raise DataError(f"shapes: seed {seed} must not be negative")
    if cache_dir is None:
        return _to_records(_make_all(seed, split, count, made_of, workers), split, made_of)
    key = json.dumps([VERSION, seed, split, count, dataclasses.asdict(made_of)])
    path = os.path.join(cache_dir, f"shapes_{split}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz")
    columns = _read_cache(path)
    if columns is None:
        columns = _make_all(seed, split, count, made_of, workers)
        _write_cache(path, columns)
    return _to_records(columns, split, made_of)


def _make_columns(seed: int, split: str, start: int, stop: int, options: Options) -> dict[str, np.ndarray]:
    """Examples `start..stop-1` as flat arrays, which can be joined, sent between processes and saved."""
    pngs, masks, mask_images, texts, types, objects = [], [], [], [], [], []
    for index in range(start, stop):
        example = make_example(seed, split, index, options)
        rows: dict[tuple[int, ...], int] = {}  # an object, or a union or nothing in generalised use
        for members, kind, text in example.expressions:
            if members not in rows:
                rows[members] = len(masks)
                masks.append(_union([example.masks[i] for i in members], options.image_size))
                mask_images.append(index - start)
            texts.append(text)
            types.append(kind)
            objects.append(rows[members])
        pngs.append(example.png)
    pngs, masks = Blobs.join(pngs), Blobs.join(masks)
    return {
        "png": pngs.buffer,
        "png_ends": pngs.ends,
        "mask": masks.buffer,
        "mask_ends": masks.ends,
        "mask_images": np.array(mask_images, np.int64),
        "text": np.frombuffer("\n".join(texts).encode(), np.uint8),
        "type": np.frombuffer("\n".join(types).encode(), np.uint8),
        "objects": np.array(objects, np.int64),
    }


def _union(counts: list[bytes], size: int) -> bytes:
    if len(counts) == 1:
        return counts[0]
    return coco_mask.merge([{"size": [size, size], "counts": c} for c in counts])["counts"] if counts else b""


# Columns that hold rows or ends of another column, which grow by that column's length when parts are joined.
_OFFSETS = {"png_ends": "png", "mask_ends": "mask", "mask_images": "png_ends", "objects": "mask_ends"}


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    joined = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        if name in ("text", "type"):
            newline = np.frombuffer(b"\n", np.uint8)
            columns = [piece for column in columns for piece in (column, newline)][:-1]
        elif name in _OFFSETS:
            lengths = [len(part[_OFFSETS[name]]) for part in parts]
            before = np.cumsum([0, *lengths[:-1]])
            columns = [column + start for column, start in zip(columns, before, strict=True)]
        joined[name] = np.concatenate(columns)
    return joined


def _to_records(columns: dict[str, np.ndarray], split: str, options: Options) -> Records:
    images = Blobs(columns["png"], columns["png_ends"])
    masks = RleMasks(Blobs(columns["mask"], columns["mask_ends"]), options.image_size, options.image_size)
    texts = columns["text"].tobytes().decode().split("\n")
    return Records(
        split=split,
        images=images,
        sizes=np.full((len(images), 2), options.image_size, np.int32),
        image_ids=np.arange(len(images)),
        segmentations=masks,
        object_images=columns["mask_images"],
        object_ids=np.arange(len(masks)),
        texts=texts,
        types=[sys.intern(kind) for kind in columns["type"].tobytes().decode().split("\n")],
        objects=columns["objects"],
        sentence_ids=np.arange(len(texts)),
    )


def _make_all(
    seed: int, split: str, count: int, options: Options, workers: int | None
) -> dict[str, np.ndarray]:
    workers = min(workers or os.cpu_count() or 1, max(count // _SCENES_PER_WORKER, 1))
    bounds = [count * i // workers for i in range(workers + 1)]
    tasks = [(seed, split, a, b) for a, b in itertools.pairwise(bounds)]
    if workers == 1:
        return _make_columns(*tasks[0], options)
    # Plain processes rather than multiprocessing: forking is unsafe beside JAX's threads, and spawning would
    # run the main module, with all that it imports, once per process.
    package_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = "from input_pipeline.shapes import _work; _work()"
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i, task in enumerate(tasks[1:]):
            path = os.path.join(folder, f"{i}.npz")
            text = json.dumps([*task, dataclasses.asdict(options), path])
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([package_root, os.environ.get("PYTHONPATH", "")])
            }
            process = subprocess.Popen([sys.executable, "-c", command, text], env=environment)
            running.append((process, path))
        try:
            parts = [_make_columns(*tasks[0], options)]
            for process, path in running:
                if process.wait():
                    raise DataError(
                        f"shapes: a process that makes scenes ended with exit code {process.returncode}"
                    )
                with np.load(path) as part:
                    parts.append(dict(part))
        finally:
            for process, _ in running:
                process.kill()
                process.wait()
    return _join(parts)


def _work() -> None:
    *task, options, path = json.loads(sys.argv[1])
    options["types"] = tuple(options["types"])
    np.savez(path, **_make_columns(*task, Options(**options)))


def _read_cache(path: str) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path) as stored:
            return dict(stored)
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy raises several kinds for a damaged file
        raise DataError(
            f"{path}: not a readable cache of shapes ({error}); delete it to have it made again"
        ) from error


def _write_cache(path: str, columns: dict[str, np.ndarray]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **columns)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
