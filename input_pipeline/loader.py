"""Batches for training and evaluation: which example comes when, decoding, and prefetching.

What a step sees is a pure function of (seed, step), so a run continues at any step at once, and every process
of a multi-host run computes its own share without a word to the others.
"""

from __future__ import annotations

import functools
import os
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from absl import logging

from input_pipeline import masks, ops
from input_pipeline.records import DataError, Records
from input_pipeline.tokenizer import Tokenizer

T = TypeVar("T")
Batch = dict[str, np.ndarray]
ONE_SENTENCE, ALL_SENTENCES = "one", "all"


@functools.lru_cache(maxsize=8)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch shows its n examples, int64 [n] (read-only, since it is shared)."""
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(n)
    order.flags.writeable = False
    return order


class Loader:
    """Iterable of batches.

    A batch is a dict: image float32 [B, H, W, 3], normalised; mask uint8 [B, H, W], ground truth under the
    'exactly_one' rule, squashed by nearest; text_ids and text_mask int32 [B, L]; valid bool [B], False at
    padding; index int32 [B], row in the records or -1. B is the share of this process: the global batch is
    the concatenation over processes.

    Training is endless: step s shows positions [s * batch_size, (s + 1) * batch_size) of the epochs written
    one after another, each in its own order. Evaluation goes through the records once, in order; the last
    batch is padded and nothing is dropped.

    Args:
        records: the examples.
        tokenizer: for their sentences, which are encoded once, here.
        batch_size: of all processes together.
        image_size: (height, width) of what the model sees.
        seed: of the training order.
        train: endless and shuffled, or once and in order.
        sentences: training only; 'one' shows every object once per epoch with a sentence chosen anew each
            time, as the papers do, 'all' shows every sentence once per epoch.
        process_index, process_count: this process and all of them.
        start_step: the step of the first batch (training).
        prefetch: batches made ahead.
        workers: parallel decoders; None: one per core.
        cache_bytes: decoded images are kept in memory if all of them need no more than this.
    Raises:
        DataError: for impossible arguments; while iterating, for an unreadable image, naming it.
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
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
        prefetch: int = 2,
        workers: int | None = None,
        cache_bytes: int = 2**30,
    ):
        if not len(records):
            raise DataError(f"split {records.split!r} has no examples")
        if batch_size < 1 or batch_size % process_count:
            raise DataError(
                f"batch_size {batch_size} must be a positive multiple of the {process_count} processes"
            )
        if sentences not in (ONE_SENTENCE, ALL_SENTENCES):
            raise DataError(f"sentences {sentences!r} is none of {ONE_SENTENCE!r}, {ALL_SENTENCES!r}")
        self.records, self.batch_size, self.image_size = records, batch_size, tuple(image_size)
        self.train, self.seed, self.start_step = train, seed, start_step
        self._share = slice(
            batch_size // process_count * process_index, batch_size // process_count * (process_index + 1)
        )
        self._prefetch, self._workers = prefetch, workers or os.cpu_count() or 1
        self.text_ids, self.text_mask, truncated = tokenizer.encode(records.texts)  # [N, L]
        if truncated.any():
            logging.warning(
                "split %s: %d of %d sentences are longer than %d tokens and are cut there",
                *(records.split, truncated.sum(), len(truncated), tokenizer.max_length),
            )
        self._groups = _Groups(records.objects) if train and sentences == ONE_SENTENCE else None
        self.epoch_size = len(self._groups) if self._groups else len(records)
        self._image_rows = records.image_rows
        h, w = self.image_size
        used_images, used_objects = np.unique(self._image_rows), np.unique(records.objects)
        small = len(used_images) * h * w * 3 + len(used_objects) * h * w // 8 <= cache_bytes
        self._used = (used_images, used_objects) if small else None

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
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self._share]
        if not self.train:
            return np.where(positions < self.epoch_size, positions, -1)
        epochs, places = np.divmod(positions, self.epoch_size)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            members = epoch_order(self.epoch_size, self.seed, int(epoch))[places[here]]
            rows[here] = self._groups.choose(members, self.seed, int(epoch)) if self._groups else members
        return rows

    def __iter__(self) -> Iterator[Batch]:
        batches = self._from_memory() if self._used else self._from_tf_data()
        return _in_background(batches, self._prefetch) if self._prefetch else batches

    def _steps(self) -> Iterable[int]:
        step = self.start_step if self.train else 0
        while self.train or step < len(self):
            yield step
            step += 1

    def _batch(self, rows: np.ndarray, images: np.ndarray, truths: np.ndarray) -> Batch:
        valid = rows >= 0
        # Padding repeats row 0, whatever it shows: `valid` keeps it out of every sum.
        filled = np.where(valid, rows, 0)
        return {
            "image": ops.normalise(images),
            "mask": truths,
            "text_ids": self.text_ids[filled],
            "text_mask": self.text_mask[filled],
            "valid": valid,
            "index": rows.astype(np.int32),
        }

    # Small images: decode each once, keep bytes and packed masks, index.

    def _from_memory(self) -> Iterator[Batch]:
        images, truths = self._store
        image_slot, object_slot = self._slots
        for step in self._steps():
            rows = self.rows(step)
            filled = np.maximum(rows, 0)
            packed = truths[object_slot[self.records.objects[filled]]]
            truth = np.unpackbits(packed, axis=-1, count=self.image_size[0] * self.image_size[1])
            yield self._batch(
                rows, images[image_slot[self._image_rows[filled]]], truth.reshape(-1, *self.image_size)
            )

    @functools.cached_property
    def _slots(self) -> tuple[np.ndarray, np.ndarray]:
        """Where an image row and an object row are in the store."""
        slots = []
        for used in self._used:
            slot = np.zeros(used[-1] + 1, np.int64)
            slot[used] = np.arange(len(used))
            slots.append(slot)
        return tuple(slots)

    @functools.cached_property
    def _store(self) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [I, H, W, 3] and masks packed to bits uint8 [O, H*W/8], of what the records use."""
        used_images, used_objects = self._used
        tf = ops.tensorflow()
        dataset = tf.data.Dataset.from_tensor_slices(used_images)
        dataset = dataset.map(self._load_image, self._workers, deterministic=True).batch(64)
        images = np.empty((len(used_images), *self.image_size, 3), np.uint8)
        done = 0
        try:
            for part in dataset.as_numpy_iterator():
                images[done : done + len(part)] = part
                done += len(part)
        except tf.errors.OpError as error:
            self._explain(used_images[done : done + 64], error)
        h, w = self.image_size
        truths = np.empty((len(used_objects), -(-h * w // 8)), np.uint8)
        for start in range(0, len(used_objects), 256):
            some = np.stack([self._truth(row) for row in used_objects[start : start + 256]])
            truths[start : start + 256] = np.packbits(some.reshape(len(some), -1), axis=-1)
        return images, truths

    # Large images: a tf.data graph decodes and resizes in parallel, outside of Python's lock.

    def _from_tf_data(self) -> Iterator[Batch]:
        tf = ops.tensorflow()

        def examples() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for step in self._steps():
                rows = np.maximum(self.rows(step), 0)
                yield self._image_rows[rows], self.records.objects[rows]

        failures: list[Exception] = []

        def truth_of(row: int) -> np.ndarray:
            try:
                return self._truth(row)
            except Exception as error:  # raised below, where it is not wrapped into pages of TensorFlow's own
                failures.append(error)
                return np.zeros(self.image_size, np.uint8)

        def load(image_row: tf.Tensor, object_row: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            truth = tf.numpy_function(truth_of, [object_row], tf.uint8)
            return self._load_image(image_row), tf.ensure_shape(truth, self.image_size)

        vector = tf.TensorSpec([None], tf.int64)
        dataset = tf.data.Dataset.from_generator(examples, output_signature=(vector, vector)).unbatch()
        dataset = dataset.map(load, self._workers, deterministic=True)
        dataset = dataset.batch(self._share.stop - self._share.start).prefetch(1)
        iterator = dataset.as_numpy_iterator()
        for step in self._steps():
            rows = self.rows(step)
            try:
                images, truths = next(iterator)
            except tf.errors.OpError as error:
                self._explain(self._image_rows[np.maximum(rows, 0)], error)
            if failures:
                raise failures[0]
            yield self._batch(rows, images, truths)

    def _load_image(self, row: tf.Tensor) -> tf.Tensor:  # noqa: F821
        tf = ops.tensorflow()
        encoded = tf.ensure_shape(tf.numpy_function(self._encoded, [row], tf.string), ())
        return ops.resize_image(ops.decode_image(encoded), self.image_size)

    def _encoded(self, row: int) -> bytes:
        image = self.records.images[row]
        if isinstance(image, bytes):
            return image
        try:
            with open(image, "rb") as file:
                return file.read()
        except OSError:
            return b""  # fails to decode, and `_explain` then says why

    def _truth(self, row: int) -> np.ndarray:
        height, width = self.records.sizes[self.records.object_images[row]]
        segmentation = self.records.segmentations[row]
        return masks.resize_nearest(
            masks.decode(segmentation, int(height), int(width), masks.EXACTLY_ONE), self.image_size
        )

    def _explain(self, image_rows: np.ndarray, error: Exception) -> None:
        """TensorFlow's errors name no file: finds it among the candidates and raises DataError."""
        for row in image_rows:
            image = self.records.images[row]
            ops.open_image(image)
            try:
                ops.decode_image(self._encoded(row))
            except type(error) as reason:  # Pillow is the more forgiving reader of damaged files
                name = f"image {self.records.image_ids[row]}" if isinstance(image, bytes) else image
                raise DataError(f"{name}: not a readable image ({_one_line(reason)})") from None
        raise DataError(
            f"split {self.records.split!r}: cannot load an example ({_one_line(error)})"
        ) from error


def _one_line(error: Exception) -> str:
    """What a TensorFlow error says, without the graph nodes that it happened in."""
    return re.sub(r"\{\{.*?\}\}|\[[^\[\]]*\]|\s+", " ", str(error)).strip()


class _Groups:
    """Sentences grouped by object: row of any of an object's sentences, without a Python object per group."""

    def __init__(self, objects: np.ndarray):
        self._rows = np.argsort(objects, kind="stable")
        _, self._starts, self._counts = np.unique(objects[self._rows], return_index=True, return_counts=True)

    def __len__(self) -> int:
        return len(self._starts)

    def choose(self, groups: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """One row of each group, by (seed, epoch, group) alone."""
        draws = _uniforms(len(self), seed, epoch)[groups]
        return self._rows[self._starts[groups] + (draws * self._counts[groups]).astype(np.int64)]


@functools.lru_cache(maxsize=8)
def _uniforms(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 1]))).random(n)


def _in_background(items: Iterator[T], size: int) -> Iterator[T]:
    """The same items, made ahead by a thread, which ends when the consumer does."""
    ready: queue.Queue = queue.Queue(size)
    closed = threading.Event()

    def put(entry: tuple) -> None:
        while not closed.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put((item, None))
                if closed.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:  # handed to the consumer, who raises it
            put((None, error))

    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
