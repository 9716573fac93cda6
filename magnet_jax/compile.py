"""Compiles the real train or eval step for hardware that need not be here, and reports what it would take."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from input_pipeline import DataError, Tokenizer
from magnet_jax import hardware
from magnet_jax.errors import UserError
from magnet_jax.hlo_text import cost
from magnet_jax.network import build_network
from magnet_jax.optim import make_optimizer
from magnet_jax.parallelism import jit_eval_step, jit_train_step
from magnet_jax.sharding import batch_parts, batch_sharding, make_mesh, state_sharding
from magnet_jax.train_step import configured_train_step, init_state
from magnet_jax.trained import batch_shapes, with_vocabulary
from magnet_jax.workdir import write_json

STEPS = ("train", "eval")
_BERT_WORDS, _BERT_MASK = 30522, 103  # Of BERT-base-uncased.


def compile_for(config: ConfigDict, topology: str, step: str = "train") -> dict[str, Any]:
    """Compiles for one topology, like 'v5e:4x4' or 'h100:8'; returns the report, whether it fits or not.

    Bytes are per device, `flops` those of matrix products and convolutions of one step of the whole batch. Raises UserError
    for a topology that cannot be compiled for, and for a batch or mesh that does not suit it.
    """
    if step not in STEPS:
        raise UserError(f"--step is '{step}'; expected one of {', '.join(STEPS)}")
    chip = hardware.CHIPS[hardware.parse(topology)[0]]
    devices = hardware.devices(topology)
    mesh = make_mesh(config.mesh, devices)
    size = config.data.batch_size if step == "train" else config.eval.batch_size
    parts = batch_parts(mesh) * (config.train.accumulate if step == "train" else 1)
    if size % parts:
        section = "data" if step == "train" else "eval"
        raise UserError(f"config.{section}.batch_size is {size}; {topology} needs a multiple of {parts}")
    config = config.copy_and_resolve_references()
    config.data.batch_size, config.parallelism = size, "jit"
    network, batch = build_network(config), batch_shapes(config)
    tx, schedule = make_optimizer(config.optimizer, 1000)
    if step == "eval":
        tx = optax.identity()
    init = functools.partial(init_state, network, tx, config.seed, batch, ema=bool(config.train.ema))
    shapes = jax.eval_shape(init)
    shardings = state_sharding(shapes, mesh, config.sharding)
    if step == "train":
        function = configured_train_step(config, network, tx, schedule, batch_sharding=batch_sharding(mesh))
        jitted = jit_train_step(function, shardings, mesh)
    else:
        shapes, shardings = shapes.variables, shardings.variables
        jitted = jit_eval_step(network, shardings, mesh)
    report = {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "sharding": [list(rule) for rule in config.sharding],
        "step": step,
        "batch_size": size,
        "dtype": config.model.dtype,
        "remat": list(config.model.remat),
        "parameters": sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes if step == "eval" else shapes.params)
        ),
        "flops": count_flops(jax.make_jaxpr(jitted)(shapes, batch).jaxpr),
        "jax": jax.__version__,
    }
    lowered = jitted.lower(shapes, batch)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
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
    return report | _of_compiled(compiled, chip, report)


def _of_compiled(compiled, chip: hardware.Chip, report: dict) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    kinds = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(kinds.values()) - memory.alias_size_in_bytes
    found = cost(compiled.as_text())
    result = {
        "fits": not chip.memory or total <= chip.memory,
        "bytes": kinds
        | {"aliased": memory.alias_size_in_bytes, "total": total, "limit": chip.memory or None},
        "collectives": {
            kind: {"count": found.counts[kind], "bytes": found.sizes[kind]} for kind in sorted(found.counts)
        },
        "wire_bytes": found.wire,
    }
    if chip.clock and found.cycles:
        # The compiler tells no cycles of gathers and the like: for these the time that their bytes take is added.
        compute, silent = found.cycles / chip.clock, found.silent_bytes / chip.bandwidth
        seconds = compute + silent
        per_device = report["batch_size"] / report["devices"]
        result |= {
            "seconds": seconds,
            "seconds_of_cycles": compute,
            "seconds_of_silent_bytes": silent,
            "silent_operations": found.silent,
            "images_per_second_per_device": per_device / seconds,
            "utilisation": report["flops"] / report["devices"] / seconds / chip.peak,
        }
    return result


def count_flops(jaxpr) -> int:
    """FLOPs of matrix products and convolutions of a program, bodies of scans as often as they run.

    A product of [m, k] and [k, n] is 2 m k n. What is computed again for the backward pass (remat) counts again.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_features
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.core.jaxprs_in_params(equation.params):
            total += times * count_flops(inner)
    return total


def complete(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """A configuration whose vocabulary may not be here, with the size that BERT's has; and a line that says so."""
    try:
        return with_vocabulary(config, Tokenizer(config.data.vocab, config.data.max_words)), []
    except DataError as error:
        config = config.copy_and_resolve_references()
        config.model.bert.vocab_size = config.model.bert.vocab_size or _BERT_WORDS
        config.loss.mask_id = _BERT_MASK if config.loss.mask_id == -1 else config.loss.mask_id
        return config, [f"note: {error}; compiled for {config.model.bert.vocab_size} words"]


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
    config: ConfigDict, names: Sequence[str], step: str, output: str | None
) -> list[dict[str, Any]]:
    """Compiles for several topologies; prints a row of each and writes all reports as JSON where `output` is given."""
    config, notes = complete(config)
    print("\n".join([*notes, HEADER]), flush=True)
    reports = []
    for name in names:
        reports.append(compile_for(config, name, step))
        print(line(reports[-1]), flush=True)
        if output:
            write_json(output, reports)
    return reports
