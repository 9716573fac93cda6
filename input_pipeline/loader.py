"""Batches for training and evaluation: which example comes when, decoding, and prefetching.

What a step sees is a pure function of (seed, step), so a run continues at any step at once, and every process
of a multi-host run computes its own share without a word to the others.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from input_pipeline import augment, examples, masks, ops, parallel
from input_pipeline.augment import Augmentation, Draw
from input_pipeline.order import Groups, epoch_order
from input_pipeline.records import DataError, Records
from input_pipeline.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
ONE_SENTENCE, ALL_SENTENCES = "one", "all"
_CHUNK = 64  # Images that a worker decodes at a time for the memory.


class Loader:
    """Iterable of batches.

    A batch is a dict: image uint8 [B, H, W, 3]; mask uint8 [B, H, W], ground truth under the 'exactly_one' rule,
    squashed by nearest; text_ids and text_mask int32 [B, L]; valid bool [B], False at padding and at records that
    cannot be used; index int32 [B], row in the records or -1. B is this process's share of the batch.

    Training is endless: step s shows positions [s * batch_size, (s + 1) * batch_size) of the epochs written
    one after another, each in its own order. Evaluation goes through the records once, in order; the last
    batch is padded and nothing is dropped.

    A record whose image is missing, damaged or of another size than its annotations, whose segmentation is none or, in
    training, covers nothing, or whose sentence has no words, takes its place as an example that is not valid, is logged
    once and is counted in `bad`.

    Args:
        records: the examples.
        tokenizer: for their sentences, which are encoded once, here.
        batch_size: of all processes together.
        image_size: (height, width) of what the model sees.
        seed: of the training order.
        train: endless and shuffled, or once and in order.
        sentences: training only; 'one' shows every object once per epoch with a sentence chosen anew each
            time, as the papers do, 'all' shows every sentence once per epoch.
        augmentation: training only.
        max_bad_share: of the records; with more bad ones the loader fails.
        share: places in the batch that this process has to fill, ascending; None: all.
        start_step: the step of the first batch (training).
        prefetch: batches made ahead.
        workers: batches decoded at the same time; None or 0: one per core.
        cache_bytes: decoded images are kept in memory if all of them need no more than this.
    Raises:
        DataError: for impossible arguments; while iterating, when too many records are bad, naming the first.
    """

    def __init__(
        self,
        records: Records,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        image_size: tuple[int, int],
        seed: int = 0,
        train: bool = False,
        sentences: str = ONE_SENTENCE,
        augmentation: Augmentation | None = None,
        max_bad_share: float = 0.0,
        share: Sequence[int] | None = None,
        start_step: int = 0,
        prefetch: int = 2,
        workers: int | None = None,
        cache_bytes: int = 2**30,
    ):
        if not len(records):
            raise DataError(f"split {records.split!r} has no examples")
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; expected at least 1")
        if sentences not in (ONE_SENTENCE, ALL_SENTENCES):
            raise DataError(f"sentences {sentences!r} is none of {ONE_SENTENCE!r}, {ALL_SENTENCES!r}")
        self.records, self.batch_size, self.image_size = records, batch_size, tuple(image_size)
        self.train, self.seed, self.start_step = train, seed, start_step
        self.bad: dict[int, str] = {}  # Row in the records -> what is wrong.
        self._max_bad = int(max_bad_share * len(records))
        self._share = np.arange(batch_size) if share is None else np.asarray(share)
        self._prefetch, self._workers = prefetch, workers or os.cpu_count() or 1
        self._augmentation = augmentation if train and augmentation else None
        self.text_ids, self.text_mask, truncated = tokenizer.encode(records.texts, allow_empty=True)  # [N, L]
        self._wordless = (self.text_mask.sum(1) <= 2) & train
        if truncated.any():
            logging.warning(
                "split %s: %d of %d sentences are longer than %d tokens and are cut there",
                *(records.split, truncated.sum(), len(truncated), tokenizer.max_length),
            )
        if self._augmentation and self._augmentation.flip:
            mirrored = [augment.mirrored(text) for text in records.texts]
            self._can_flip = np.array([text is not None for text in mirrored])
            self._flipped_ids, self._flipped_mask, _ = tokenizer.encode(
                [text or "" for text in mirrored], allow_empty=True
            )
        self._groups = Groups(records.objects) if train and sentences == ONE_SENTENCE else None
        self.epoch_size = len(self._groups) if self._groups else len(records)
        self._image_rows = records.image_rows
        h, w = self.image_size
        used_images, used_objects = np.unique(self._image_rows), np.unique(records.objects)
        small = len(used_images) * h * w * 3 + len(used_objects) * h * w // 8 <= cache_bytes
        self._used = (used_images, used_objects) if small and not self._augmentation else None

    @property
    def steps_per_epoch(self) -> float:
        """Steps that show every example once; a fraction, since training epochs follow without a gap."""
        return self.epoch_size / self.batch_size

    def __len__(self) -> int:
        if self.train:
            raise TypeError("a training loader is endless; see steps_per_epoch")
        return -(-self.epoch_size // self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Rows in the records that this process shows at a step, int64 [B]; -1 is padding."""
        positions = step * self.batch_size + self._share
        if not self.train:
            return np.where(positions < self.epoch_size, positions, -1)
        epochs, places = np.divmod(positions, self.epoch_size)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            members = epoch_order(self.epoch_size, self.seed, int(epoch))[places[here]]
            rows[here] = self._groups.choose(members, self.seed, int(epoch)) if self._groups else members
        return rows

    def draws(self, step: int) -> list[Draw] | None:
        """The random changes of each of this process's examples at a step; None without augmentation."""
        if self._augmentation is None:
            return None
        positions = step * self.batch_size + self._share
        found = []
        for position, row in zip(positions, self.rows(step), strict=True):
            draw = self._augmentation.draw(self.seed, *map(int, divmod(position, self.epoch_size)))
            if draw.flip and not self._can_flip[row]:
                draw = dataclasses.replace(draw, flip=False)
            found.append(draw)
        return found

    def __iter__(self) -> Iterator[Batch]:
        batches = self._from_memory() if self._used else self._from_tf_data()
        return parallel.in_background(batches, self._prefetch) if self._prefetch else batches

    def _steps(self) -> range:
        return range(self.start_step, 2**62) if self.train else range(len(self))

    def _batch(self, step: int, images: np.ndarray, truths: np.ndarray, errors: np.ndarray) -> Batch:
        """Puts words to pictures; errors: bytes or str [B], what is wrong with an example, empty where nothing is."""
        rows = self.rows(step)
        filled = np.maximum(rows, 0)  # Padding shows the words of row 0: `valid` keeps it out of every sum.
        ids, words = self.text_ids[filled], self.text_mask[filled]
        valid = rows >= 0
        for k, row in enumerate(map(int, rows)):
            error = errors[k].decode() if isinstance(errors[k], bytes) else errors[k]
            if not error and row >= 0 and self._wordless[row]:
                name = examples.name(self.records, int(self._image_rows[row]))
                error = f"{name}: the sentence {self.records.texts[row]!r} has no words"
            if error:
                valid[k] = False
                self._report(row, error)
        for k, draw in enumerate(self.draws(step) or ()):
            if draw.flip:
                ids[k], words[k] = self._flipped_ids[rows[k]], self._flipped_mask[rows[k]]
        if len(self.bad) > self._max_bad:
            raise DataError(
                f"split '{self.records.split}': {len(self.bad)} of {len(self.records)} examples cannot be used, more than "
                f"config.data.max_bad_share allows; the first: {next(iter(self.bad.values()))}"
            )
        return {
            "image": images,
            "mask": truths,
            "text_ids": ids,
            "text_mask": words,
            "valid": valid,
            "index": rows.astype(np.int32),
        }

    def _report(self, row: int, error: str) -> None:
        """Counts a bad record; says what is wrong where nothing was said about it before."""
        if row not in self.bad and error not in self.bad.values():
            logging.warning("left out: %s", error)
        self.bad[row] = error

    # Small images: decode each once, keep bytes and packed masks, index.

    def _from_memory(self) -> Iterator[Batch]:
        store = self._store
        h, w = self.image_size
        for step in self._steps():
            rows = self.rows(step)
            filled = np.maximum(rows, 0)
            image_slots = store.image_slots[self._image_rows[filled]]
            object_slots = store.object_slots[self.records.objects[filled]]
            truths = np.unpackbits(store.truths[object_slots], axis=-1, count=h * w).reshape(-1, h, w)
            errors = [
                (store.image_errors.get(i) or store.object_errors.get(o) or "") if row >= 0 else ""
                for row, i, o in zip(rows, image_slots, object_slots, strict=True)
            ]
            images = store.images[image_slots]
            blank = (rows < 0) | np.array([bool(error) for error in errors])
            images[blank], truths[blank] = 0, 0
            yield self._batch(step, images, truths, errors)

    @functools.cached_property
    def _store(self) -> _Store:
        used_images, used_objects = self._used
        h, w = self.image_size
        images = np.zeros((len(used_images), h, w, 3), np.uint8)
        truths = np.zeros((len(used_objects), -(-h * w // 8)), np.uint8)
        image_errors, object_errors = {}, {}

        def load_images(chunk: int) -> tuple:
            for slot in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(images))):
                try:
                    picture = examples.picture(self.records, int(used_images[slot]))
                    images[slot] = ops.resize_image(picture, self.image_size)
                except DataError as error:
                    image_errors[slot] = str(error)
            return (chunk,)

        chunks = range(-(-len(images) // _CHUNK))
        collections.deque(parallel.in_order(load_images, chunks, ["int64"], self._workers), maxlen=0)
        for slot, row in enumerate(used_objects):
            try:
                truths[slot] = np.packbits(masks.resize_nearest(self._truth(int(row)), self.image_size))
            except DataError as error:
                object_errors[slot] = str(error)
        slots = []
        for used in self._used:
            slot = np.zeros(used[-1] + 1, np.int64)
            slot[used] = np.arange(len(used))
            slots.append(slot)
        return _Store(images, truths, *slots, image_errors, object_errors)

    # Large images: whole batches are decoded and resized side by side; Pillow lets go of Python's lock meanwhile.

    def _from_tf_data(self) -> Iterator[Batch]:
        steps = self._steps()
        loaded = parallel.in_order(self._load, steps, ["uint8", "uint8", "string"], self._workers)
        for step, arrays in zip(steps, loaded, strict=False):
            yield self._batch(step, *arrays)

    def _load(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, masks, and what is wrong with each."""
        rows = self.rows(step)
        images = parallel.buffer(len(rows), *self.image_size, 3)
        truths = parallel.buffer(len(rows), *self.image_size)
        errors = np.full(len(rows), b"", object)
        for k, (row, draw) in enumerate(zip(rows, self.draws(step) or [None] * len(rows), strict=True)):
            if row < 0:
                images[k], truths[k] = 0, 0
                continue
            try:
                picture = examples.picture(self.records, int(self._image_rows[row]))
                truth = self._truth(int(self.records.objects[row]))
            except DataError as error:
                errors[k] = str(error).encode(errors="replace")
                images[k], truths[k] = 0, 0
                continue
            if draw is not None:
                picture, truth = augment.apply(draw, picture, truth)
            resized = ops.resize_image(picture, self.image_size)
            images[k] = augment.jitter(draw, resized) if draw is not None else resized
            truths[k] = masks.resize_nearest(truth, self.image_size)
        return images, truths, errors

    def _truth(self, object_row: int) -> np.ndarray:
        return examples.truth(self.records, object_row, masks.EXACTLY_ONE, empty=not self.train)


@dataclasses.dataclass(frozen=True)
class _Store:
    """Everything in memory: images uint8 [I, H, W, 3], masks packed to bits uint8 [O, H*W/8], where rows are in them."""

    images: np.ndarray
    truths: np.ndarray
    image_slots: np.ndarray
    object_slots: np.ndarray
    image_errors: dict[int, str]  # By slot.
    object_errors: dict[int, str]
