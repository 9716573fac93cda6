"""Accelerators that need not be here: what they can do, and devices of them to compile for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental import topologies

from magnet_jax.errors import UserError
from magnet_jax.kernel_text import PASS


@dataclasses.dataclass(frozen=True)
class Chip:
    """Per chip: peak bfloat16 FLOP/s, bytes of memory, bytes/s to it, and cycles/s (0 where the compiler counts none)."""

    platform: str
    peak: float
    memory: float
    bandwidth: float
    clock: float = 0.0


# Makers' figures; a TPU's clock is its peak over the FLOPs of its matrix units a cycle.
CHIPS = {
    "v5e": Chip("tpu", 197e12, 16 * 2**30, 819e9, 1.5e9),
    "v5p": Chip("tpu", 459e12, 95 * 2**30, 2765e9, 1.75e9),
    "v6e": Chip("tpu", 918e12, 32 * 2**30, 1640e9, 1.75e9),
    "h100": Chip("cuda", 989e12, 84929347584, 3352e9),
    "cpu": Chip("cpu", 0.0, 0.0, 0.0),
}
_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 patch: 0 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_EXTRAS = {"tpu": "requirements-compile-tpu.txt", "cuda": "requirements-compile-cuda.txt"}


def prepare(names: Sequence[str]) -> None:
    """Settings that have to be made before JAX is used, so that nothing is looked for that is not here."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Compiling takes no chip from anybody.
    if any(CHIPS[parse(name)[0]].platform == "tpu" for name in names):
        _print_schedules()
    # Nothing can be tried out on a GPU that is not there, and untried Triton has no tiles for some of the products.
    untried = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {untried}".strip()
    jax.config.update("jax_platforms", "cpu")
    counts = [parse(name)[1] for name in names if parse(name)[0] == "cpu"]
    if counts:
        jax.config.update("jax_num_cpu_devices", max(int(count) for count in counts))


def _print_schedules() -> None:
    """Has libtpu write the schedules of all that it compiles; it can be told so only before it is loaded."""
    folder = tempfile.TemporaryDirectory()
    wanted = f"--xla_jf_dump_to={folder.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^{PASS}$"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {wanted}".strip()
    _folders.append(folder)


_folders: list[tempfile.TemporaryDirectory] = []


@contextlib.contextmanager
def schedules() -> Iterator[Path]:
    """The folder of the schedules of what is compiled meanwhile, after `prepare` for a TPU."""
    folder = Path(_folders[-1].name)
    yield folder
    for file in folder.iterdir():
        file.unlink()


def parse(name: str) -> tuple[str, str]:
    """Chip and arrangement of a name like 'v5e:4x4' or 'h100:8'; raises UserError for another."""
    chip, _, arrangement = name.partition(":")
    parts = arrangement.split("x")
    flat = chip in CHIPS and CHIPS[chip].platform != "tpu"
    if (
        chip not in CHIPS
        or not all(part.isdecimal() and int(part) for part in parts)
        or (flat and len(parts) > 1)
    ):
        raise UserError(
            f"--topology has '{name}'; expected a chip of {', '.join(CHIPS)} and how many, as in v5e:4x4, v5p:8x8x16, "
            "v6e:2x4, h100:8 or cpu:8"
        )
    return chip, arrangement


def devices(name: str) -> list[jax.Device]:
    """Devices of a topology to compile for; raises UserError where its compiler is not installed or knows it not."""
    chip, arrangement = parse(name)
    platform = CHIPS[chip].platform
    if platform == "cpu":
        return jax.devices("cpu")[: int(arrangement)]
    try:
        if platform == "tpu":
            return list(topologies.get_topology_desc(name, platform="tpu").devices)
        count = int(arrangement)  # Hosts have eight.
        hosts = f"1x{-(-count // 8)}x{min(count, 8)}"
        return list(
            topologies.get_topology_desc("h100", platform="cuda", target_config=_H100, topology=hosts).devices
        )
    except Exception as error:  # JAX and the plugins raise several kinds.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--topology={name}: {reason}; its compiler runs on any machine after: pip install -r {_EXTRAS[platform]}"
        ) from error
