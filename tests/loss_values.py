"""Prints the five loss terms of a file of inputs as JSON: `python tests/loss_values.py INPUTS.npz --tau=T`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from magnet_jax import losses


def loss_values(inputs, tau: float, block: int | None = None) -> dict[str, float]:
    """Every loss term of arrays named as in tests/data/losses.npz."""
    foreground = inputs["foreground"].astype(bool)
    weight = np.ones(len(foreground), np.float32)
    labels = np.where(inputs["token_selected"] > 0, inputs["token_labels"], -1)
    mask = inputs["mask"].astype(np.float32)
    terms = {
        "pixel_to_pixel": losses.pixel_to_pixel(inputs["features"], foreground, weight, tau=tau, block=block),
        "pixel_to_text": losses.pixel_to_text(
            inputs["features"], inputs["text"], foreground, weight, tau=tau
        ),
        "grounding": losses.masked_words(inputs["token_logits"], labels, weight),
        "bce": losses.binary_cross_entropy(inputs["mask_logits"], mask, weight),
        "dice": losses.dice(inputs["mask_logits"], mask, weight),
    }
    return {name: float(value) for name, value in terms.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--tau", type=float, default=0.1)
    arguments = parser.parse_args()
    with np.load(arguments.inputs) as arrays:
        print(json.dumps(loss_values(arrays, arguments.tau)))
