"""Work done side by side and ahead of its use: a tf.data graph, and a thread."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


@functools.cache
def tensorflow():
    """The TensorFlow module, with accelerators hidden from it: it would take their memory away from JAX.

    Imported at the first use: prediction and the makers of shapes need not wait seconds for it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


def in_order(
    function: Callable[[int], tuple], numbers: range, types: Sequence[str], workers: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """The arrays that `function` makes of every number, in order; tf.data runs `workers` calls at a time.

    Args: types: of its arrays, as TensorFlow names them. Raises what the function raises.
    """
    tf = tensorflow()
    failures: list[BaseException] = []

    def call(number: np.ndarray) -> tuple:
        try:
            return function(int(number))
        except (
            BaseException
        ) as error:  # Raised below, where it is not wrapped into pages of TensorFlow's own.
            failures.append(error)
            raise

    def step(number: Any) -> tuple:
        return tuple(tf.numpy_function(call, [number], [tf.dtypes.as_dtype(name) for name in types]))

    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    dataset = tf.data.Dataset.range(numbers.start, numbers.stop).map(step, workers, deterministic=True)
    iterator = dataset.prefetch(1).with_options(options).as_numpy_iterator()
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            raise (failures[0] if failures else error) from None


def buffer(*shape: int) -> np.ndarray:
    """uint8 [*shape], not set, placed so that TensorFlow takes it over without a copy."""
    size, boundary = int(np.prod(shape)), 64
    raw = np.empty(size + boundary, np.uint8)
    start = -raw.ctypes.data % boundary
    return raw[start : start + size].reshape(shape)


def in_background(items: Iterator[T], size: int) -> Iterator[T]:
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
