"""Compiles the real train or eval step for hardware that need not be here, and reports what it would take."""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from magnet_jax import hardware
from magnet_jax.hlo_text import cost
from magnet_jax.kernel_text import kernel_cycles
from magnet_jax.programs import build_program, complete
from magnet_jax.sharding import make_mesh
from magnet_jax.trace import by_part, names_of_operations, part_of
from magnet_jax.workdir import write_json

# What `quick` asks of the compiler. Since 0.12 JAX takes the numbers of levels alone, of which 19 is O1; before, any number.
QUICK = 19 if jax.__version_info__ >= (0, 12) else 1


def compile_for(
    config: ConfigDict, topology: str, step: str = "train", quick: bool = False
) -> dict[str, Any]:
    """Compiles for one topology, like 'v5e:4x4' or 'h100:8'; returns the report, whether it fits or not.

    Bytes are per device, `flops` those of matrix products and convolutions of one step of the whole batch. quick: with
    less optimisation, for memory and traffic alone, which differ little from what they will be. Raises UserError
    for a topology that cannot be compiled for, and for a batch or mesh that does not suit it.
    """
    chip = hardware.CHIPS[hardware.parse(topology)[0]]
    devices = hardware.devices(topology)
    mesh = make_mesh(config.mesh, devices)
    program = build_program(config, mesh, step, topology)
    report = {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "sharding": [list(rule) for rule in config.sharding],
        "step": step,
        "batch_size": program.size,
        "dtype": config.model.dtype,
        "remat": list(config.model.remat),
        "parameters": program.parameters,
        "flops": program.flops(),
        "quick": quick,
        "jax": jax.__version__,
    }
    lowered = program.function.lower(program.state, program.batch)
    start = time.perf_counter()
    try:
        compiled, text, kernels = _compile(lowered, chip.platform, quick)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", str(error))
        unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        needed = (
            {"total": float(used[1]) * unit[used[2]], "limit": float(used[3]) * unit[used[4]]} if used else {}
        )
        return report | {
            "fits": False,
            "bytes": needed,
            "error": " ".join(str(error).split())[:600],
            "compile_seconds": time.perf_counter() - start,
        }
    report["compile_seconds"] = time.perf_counter() - start
    return report | _of_compiled(compiled, text, kernels, chip, report)


def _compile(
    lowered: jax.stages.Lowered, platform: str, quick: bool
) -> tuple[jax.stages.Compiled, str, dict[str, int]]:
    """The compiled program, its text, and the cycles of kernels of ours in it."""
    options: dict[str, Any] = {"optimization_level": QUICK} if quick else {}
    if platform != "tpu":
        compiled = lowered.compile(compiler_options=options)
        return compiled, compiled.as_text(), {}
    # jaxlib cannot always read a TPU's program, which may hold operations that only libtpu knows: it has to print it.
    printing = contextlib.nullcontext() if quick else hardware.schedules()
    with tempfile.TemporaryDirectory() as folder, printing as schedules:
        compiled = lowered.compile(compiler_options=options | {"xla_dump_to": folder})
        (file,) = Path(folder).glob("*.after_codegen.txt")
        text = file.read_text()
        return compiled, text, {} if quick else kernel_cycles(text, schedules)


def _of_compiled(
    compiled, text: str, kernels: dict[str, int], chip: hardware.Chip, report: dict
) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    kinds = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(kinds.values()) - memory.alias_size_in_bytes
    found = cost(text, kernels, chip.bandwidth / chip.clock if chip.clock else math.inf)
    result = {
        "fits": not chip.memory or total <= chip.memory,
        "bytes": kinds
        | {"aliased": memory.alias_size_in_bytes, "total": total, "limit": chip.memory or None},
        "collectives": {
            kind: {"count": found.counts[kind], "bytes": found.sizes[kind]} for kind in sorted(found.counts)
        },
        "wire_bytes": found.wire,
    }
    if chip.clock and found.cycles and not report["quick"]:
        # The compiler tells no cycles of gathers and the like: for these the time that their bytes take is added.
        compute = {operation: cycles / chip.clock for operation, cycles in found.cycles.items()}
        silent = {operation: size / chip.bandwidth for operation, size in found.silent_bytes.items()}
        seconds = sum(compute.values()) + sum(silent.values())
        names = names_of_operations(text)
        result |= {
            "seconds": seconds,
            "seconds_of_cycles": sum(compute.values()),
            "seconds_of_silent_bytes": sum(silent.values()),
            "images_per_second_per_device": report["batch_size"] / report["devices"] / seconds,
            "utilisation": report["flops"] / report["devices"] / seconds / chip.peak,
            "parts": by_part(compute | silent, names),
            "silent": [
                {"operation": operation, "part": part_of(names.get(operation, "")), "bytes": size}
                for operation, size in found.silent_bytes.most_common()
            ],
        }
    return result


def line(report: dict[str, Any]) -> str:
    """One row of the table."""
    size = report["bytes"].get("total")
    limit = report["bytes"].get("limit")
    memory = "-" if size is None else f"{size / 2**30:.1f}" + (f" of {limit / 2**30:.1f}" if limit else "")
    wire = f"{report['wire_bytes'] / 1e6:.0f}" if "wire_bytes" in report else "-"
    cells = [
        report["topology"],
        "x".join(f"{k} {v}" for k, v in report["mesh"].items()),
        str(report["batch_size"]),
    ]
    cells += ["yes" if report["fits"] else "NO", memory, f"{report['flops'] / 1e12:.2f}", wire]
    for key, scale, digits in (
        ("seconds", 1e3, 1),
        ("images_per_second_per_device", 1, 1),
        ("utilisation", 100, 1),
    ):
        cells.append(f"{scale * report[key]:.{digits}f}" if key in report else "-")
    cells.append(f"{report['compile_seconds']:.0f}")
    return "".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


_WIDTHS = (12, 18, 7, 6, 14, 9, 9, 10, 14, 7, 10)
HEADER = "".join(
    name.ljust(width)
    for name, width in zip(
        (
            "topology",
            "mesh",
            "batch",
            "fits",
            "GiB/device",
            "TFLOP",
            "MB sent",
            "ms/step",
            "images/s/chip",
            "MFU %",
            "compile s",
        ),
        _WIDTHS,
        strict=True,
    )
).rstrip()


def compile_all(
    config: ConfigDict, names: Sequence[str], step: str, output: str | None, quick: bool = False
) -> list[dict[str, Any]]:
    """Compiles for several topologies; prints a row of each and writes all reports as JSON where `output` is given."""
    config, notes = complete(config)
    print("\n".join([*notes, HEADER]), flush=True)
    reports = []
    for name in names:
        reports.append(compile_for(config, name, step, quick))
        print(line(reports[-1]), flush=True)
        if output:
            write_json(output, reports)
    return reports
