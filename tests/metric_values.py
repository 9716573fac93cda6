"""Prints the metrics of predicted and true masks as JSON: python tests/metric_values.py MASKS.npz

The file holds `prediction` and `ground_truth`, bool [N, H, W].
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from magnet_jax import metrics


def metric_values(path: str | Path) -> dict[str, float]:
    """oIoU, mIoU and Pr@X of the masks in a file."""
    masks = np.load(path)
    pairs = zip(masks["prediction"], masks["ground_truth"], strict=True)
    counts = np.array([metrics.count_overlap(prediction, truth) for prediction, truth in pairs])
    figures = metrics.referring(*counts.T)
    figures.pop("count")
    return figures


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/metric_values.py MASKS.npz")
    print(json.dumps(metric_values(sys.argv[1]), indent=1))
