"""What a step frees is kept: its pages are not asked for again."""

import subprocess
import sys

import jax
import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from magnet_jax.host_memory import compute_in_main_thread, keep_freed_memory

if sys.argv[1] == "keep":
    compute_in_main_thread()
    keep_freed_memory()
step = jax.jit(lambda x: jnp.sort(jnp.sort(x[:, None] * x, axis=0), axis=1).sum())  # Temporaries of 4 MB.
x = jnp.arange(1000.0)
step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or jax.default_backend() != "cpu", reason="for glibc on a CPU")
def test_temporaries_are_not_cleared_again():
    def faults(mode):
        command = [sys.executable, "-c", PROGRAM, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert 10 * faults("keep") < faults("leave")
