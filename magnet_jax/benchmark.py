"""Times the programs of a configuration on the devices that are here, as a whole and part by part."""

from __future__ import annotations

import functools
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from input_pipeline.benchmark import peak_memory
from magnet_jax import trace
from magnet_jax.compile_cache import keep_compiled
from magnet_jax.errors import UserError
from magnet_jax.host_memory import forget_peak
from magnet_jax.programs import STEPS, Program, build_program, complete, random_batch
from magnet_jax.sharding import batch_sharding, make_mesh
from magnet_jax.workdir import write_json

_TRACED = 2  # Runs in a profile.
_PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")


def benchmark(
    config: ConfigDict, workdir: str | Path, steps: tuple[str, ...] = STEPS, repetitions: int = 10
) -> dict:
    """Measures steps ('eval', the forward pass; 'gradient', forward and backward of all losses; 'train') and this machine.

    Values are random, sizes the configuration's: batches of `config.eval.batch_size` and `config.data.batch_size`. Prints
    as it goes; writes `benchmark.json` and, of every step, a folder `trace/STEP` for TensorBoard or Perfetto.
    """
    check_plugins()
    config, notes = complete(config)
    mesh = make_mesh(config.mesh)
    programs = {
        step: build_program(config, mesh, step) for step in steps
    }  # May refuse, before anything is written.
    keep_compiled(workdir)
    device = mesh.devices.flat[0]
    report: dict[str, Any] = {
        "device": f"{device.platform} {device.device_kind}",
        "devices": mesh.size,
        "jax": jax.__version__,
        "dtype": config.model.dtype,
        "rates": machine_rates(config.model.dtype, repetitions),
        "steps": {},
    }
    rates = report["rates"]
    print(*notes, sep="\n", end="\n" if notes else "")
    print(
        f"{mesh.size} x {report['device']}, {config.model.dtype}: matrix product {rates['matmul'] / 1e9:.0f} GFLOP/s, "
        f"convolution {rates['convolution'] / 1e9:.0f} GFLOP/s each",
        flush=True,
    )
    for step, program in programs.items():
        batch = jax.device_put(random_batch(program, config), batch_sharding(mesh))
        report["steps"][step] = result = measure(
            program, batch, step == "train", Path(workdir) / "trace" / step, repetitions
        )
        result["share_of_matmul_rate"] = result["flops_per_second"] / mesh.size / rates["matmul"]
        print(text(step, result), flush=True)
        write_json(Path(workdir) / "benchmark.json", report)
    return report


def check_plugins() -> None:
    """Raises UserError where a TPU's or GPU's plugin waits for hardware that is not here: JAX's profiler would crash."""
    idle = [name for name in _PLUGINS if importlib.util.find_spec(name)]
    if idle and jax.default_backend() == "cpu" and jax.config.jax_platforms != "cpu":
        raise UserError(
            f"{idle[0]} is installed and its hardware is not here, with which JAX's profiler crashes; set JAX_PLATFORMS=cpu"
        )


def machine_rates(dtype: str, repetitions: int) -> dict[str, float]:
    """FLOP/s of one device at a large matrix product and at a 3x3 convolution, the best of some runs."""
    side, channels, pixels = (2048, 256, 120) if jax.default_backend() == "cpu" else (8192, 512, 240)
    key = jax.random.key(0)
    matrix = jax.random.normal(key, (side, side), dtype)
    image = jax.random.normal(key, (1, pixels, pixels, channels), dtype)
    kernel = jax.random.normal(key, (3, 3, channels, channels), dtype)
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    work = {
        "matmul": (jax.jit(jnp.matmul), (matrix, matrix), 2 * side**3),
        "convolution": (jax.jit(convolve), (image, kernel), 2 * 9 * channels**2 * pixels**2),
    }
    return {
        name: flops / min(_timed(lambda function=function, args=args: function(*args), repetitions))
        for name, (function, args, flops) in work.items()
    }


def measure(
    program: Program, batch: Any, returns_state: bool, folder: Path, repetitions: int
) -> dict[str, Any]:
    """Times a program, which takes over its state and returns another or leaves it alone; returns the row of the report."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    start = time.perf_counter()
    lowered = program.function.lower(program.state, program.batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - traced
    jax.monitoring.unregister_event_listener(listen)
    state = jax.block_until_ready(program.init())
    del lowered
    jax.clear_caches()  # With them what it took to make the program and the state.
    gc.collect()

    def run():
        nonlocal state
        result = compiled(state, batch)
        if returns_state:
            state = result[0]
        return result

    forget_peak()  # Compiling is not what runs need.
    seconds = _timed(run, repetitions)
    device = jax.tree.leaves(batch)[0].sharding.mesh.devices.flat[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", peak_memory() * 2**20)
    file = trace.record(folder, lambda: [jax.block_until_ready(run()) for _ in range(_TRACED)])
    parts = trace.seconds_by_part(file, compiled.as_text())
    median, flops = statistics.median(seconds), program.flops()
    memory = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    return {
        "batch_size": program.size,
        "parameters": program.parameters,
        "trace_seconds": traced - start,
        "compile_seconds": compile_seconds,
        "kept": bool(hits),  # Whether it had been compiled before.
        "seconds": seconds,
        "median_seconds": median,
        "quartiles": statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3,
        "images_per_second": program.size / median,
        "flops": flops,
        "flops_of_compiler": costs.get("flops"),  # Bodies of loops once.
        "flops_per_second": flops / median,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_bytes": peak,
        "parts": {part: {k: s / _TRACED for k, s in row.items()} for part, row in parts.items()},
    }


def _timed(run: Callable[[], Any], repetitions: int) -> list[float]:
    """Seconds of every repetition, after one that is not counted."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


def text(step: str, result: dict[str, Any]) -> str:
    """A row of the report for people."""
    low, _, high = result["quartiles"]
    made = "taken from those kept" if result["kept"] else "compiled"
    lines = [
        f"\n{step}, batch {result['batch_size']}: {1e3 * result['median_seconds']:.1f} ms (quartiles {1e3 * low:.1f} to "
        f"{1e3 * high:.1f}), {result['images_per_second']:.2f} images/s, {result['flops'] / 1e9:.1f} GFLOP at "
        f"{result['flops_per_second'] / 1e9:.0f} GFLOP/s, {100 * result['share_of_matmul_rate']:.0f} % of the matrix rate",
        f"  traced in {result['trace_seconds']:.1f} s, {made} in {result['compile_seconds']:.1f} s; temporaries "
        f"{result['temporary_bytes'] / 2**30:.2f} GiB, peak {result['peak_bytes'] / 2**30:.2f} GiB",
        f"  {'part':<24}{'forward ms':>12}{'backward ms':>13}{'share %':>9}",
    ]
    total = sum(sum(row.values()) for row in result["parts"].values())
    for part, row in result["parts"].items():
        share = 100 * sum(row.values()) / total
        lines.append(f"  {part:<24}{1e3 * row['forward']:>12.1f}{1e3 * row['backward']:>13.1f}{share:>9.1f}")
    return "\n".join(lines)
