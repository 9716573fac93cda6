"""Set-up shared by all tests: two host devices, and compiled programs kept for the session."""

import importlib.metadata
import os
import tempfile

# Before jax is imported, and for the programs that tests start too. Several tests compile the same steps.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Compiling is most of the suite's time and running next to none of it: no optimising, and the older emitters of fused
# operations, which are three times as soon done with a network's gradient; jaxlib 0.12 has them no more, and XLA ends
# the process at a flag that it does not know.
_FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
    _FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST_COMPILE}".strip()

import jax

jax.config.update("jax_num_cpu_devices", 2)
