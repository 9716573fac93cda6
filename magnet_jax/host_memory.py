"""Memory of the host, where it is also the device."""

import contextlib
import ctypes
import sys
from pathlib import Path

import jax

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def compute_in_main_thread() -> None:
    """Makes CPU computations run in the thread that asks for them; to be called before JAX is used.

    `keep_freed_memory` can keep the main thread's memory only. Not for several CPU devices, which would wait for each
    other in that thread for ever.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def forget_peak() -> None:
    """Makes the largest amount of memory that this process had count from now on; on Linux only."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def keep_freed_memory() -> None:
    """Where JAX computes on the CPU, makes the C library keep what a step frees for the next one.

    By default glibc gives the temporaries of a step back to the system, which then has to clear their pages again: a
    fifth of a small network's step. Does nothing with another C library.
    """
    if jax.default_backend() != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # No trimming at all: with a threshold, which is an int, a network of usual size would be above it.
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**28)):
            mallopt(parameter, value)
