"""Memory of the host, where it is also the device."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

# JAX is imported late here: what comes before it is to come before it takes its seconds.

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
# The one block with the temporaries of a network of usual size is above it. Kept, it would be split for something
# small sooner or later, and asked for once more.
_LARGE = 2**30
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"


def start_with_huge_pages() -> None:
    """On Linux, starts this program anew, in place, with a C library that asks for pages of 2 MB; before anything else.

    A CPU's step on a network of usual size gets some gigabytes of new memory, and by pages of 4 kB the system needs a third
    of its time to clear them. glibc reads this setting at its start only. Does nothing where the variable is set
    already, there is another C library, or the system's own setting decides.
    """
    if sys.platform != "linux" or _TUNABLES in os.environ or not _HUGE_PAGES.exists():
        return
    glibc = "CS_GNU_LIBC_VERSION" in os.confstr_names and os.confstr("CS_GNU_LIBC_VERSION")
    if not glibc or "[madvise]" not in _HUGE_PAGES.read_text():
        return
    environment = {**os.environ, _TUNABLES: "glibc.malloc.hugetlb=1"}
    os.execve(sys.executable, sys.orig_argv, environment)


def compute_in_main_thread() -> None:
    """Makes CPU computations run in the thread that asks for them; to be called before JAX is used.

    `keep_freed_memory` can keep the main thread's memory only. Not for several CPU devices, which would wait for each
    other in that thread for ever.
    """
    import jax

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
    fifth of a small network's step. Blocks of 1 GB and more still go back. Does nothing with another C library.
    """
    import jax

    if jax.default_backend() != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # No trimming at all: with a threshold, which is an int, a network of usual size would be above it.
        for parameter, value in ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**28)):
            mallopt(parameter, value)
