"""One run of a study, in a process of its own: it is trained, evaluated and measured, and leaves its result."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from magnet_jax.metrics import RIGHT
from magnet_jax.study import Run, config_hash, load_study, result_file
from magnet_jax.workdir import write_json


def execute(run: Run, out: Path) -> None:
    """Trains and evaluates one run and writes its result; who calls it has a claim to the run."""
    from magnet_jax.host_memory import compute_in_main_thread, keep_freed_memory

    compute_in_main_thread()
    keep_freed_memory()
    import jax

    from magnet_jax.programs import build_program, complete
    from magnet_jax.sharding import make_mesh
    from magnet_jax.train import train
    from magnet_jax.workdir import History

    config, workdir = run.config(), out / "runs" / run.name
    configured = config_hash(config)
    if config.data.source == "shapes":  # Made once for all runs.
        config.data.options.cache_dir = str(out / "data")
    variants = load_study(run.experiment).VARIANTS
    variant = variants[run.variant]
    results = train(config, workdir)
    if not results:  # Asked to stop; the same command goes on.
        sys.exit(1)
    history = History(workdir).read()
    rates = sorted(row["train/steps_per_second"] for row in history if "train/steps_per_second" in row)
    program = build_program(complete(config)[0], make_mesh(config.mesh), "train")
    write_json(
        result_file(out, run),
        dataclasses.asdict(run)
        | {
            "label": variant.label,
            "reference": variant.reference,
            "place": list(variants).index(run.variant),
            "config_hash": configured,
            "jax": jax.__version__,
            "steps": history[-1]["step"],
            "batch_size": config.data.batch_size,
            "parameters": program.parameters,
            "flops_per_step": program.flops(),
            "steps_per_second": rates[len(rates) // 2],
            "splits": results,
            "counterfactual": counterfactual(config, workdir),
            "hidden_words": guessed(config, workdir),
            "history": [
                {k: v for k, v in row.items() if k == "step" or k.startswith("train/loss")} for row in history
            ],
        },
    )


def counterfactual(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Of pairs of sentences that differ in one word, the share of which both are understood: by split.

    Only the built-in data know such pairs; of others the result is empty.
    """
    if config.data.source != "shapes":
        return {}
    import input_pipeline
    from magnet_jax.evaluate import expression_ious
    from magnet_jax.trained import load_trained

    trained = load_trained(workdir)
    data = trained.config.data.copy_and_resolve_references()
    data.options.counterfactual = True
    found = {}
    for split in data.eval_splits:
        file = workdir / "counterfactual" / f"{split}.csv"
        ious = expression_ious(trained, split, file, counterfactual=True)
        words = input_pipeline.load_split(data, split).types
        found[split] = pair_figures((ious >= RIGHT).tolist(), words)
    return found


def guessed(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """How many hidden words a network with Mask Grounding guesses with its picture, and with another; else nothing."""
    if not config.loss.grounding:
        return {}
    from magnet_jax.hidden_words import hidden_words
    from magnet_jax.trained import load_trained

    return hidden_words(load_trained(workdir), config.data.eval_splits[0])


def pair_figures(right: Sequence[bool], words: Sequence[str]) -> dict[str, Any]:
    """Percentages of pairs, which follow one another, of which both, or one, are understood; also by the word exchanged."""
    pairs = list(zip(right[::2], right[1::2], strict=True))

    def figures(pairs):
        return {
            "both": 100 * sum(a and b for a, b in pairs) / len(pairs),
            "one": 100 * sum(a != b for a, b in pairs) / len(pairs),
            "count": len(pairs),
        }

    return figures(pairs) | {
        "words": {
            word: figures([pair for pair, other in zip(pairs, words[::2], strict=True) if other == word])
            for word in sorted(set(words))
        }
    }
