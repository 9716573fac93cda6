"""Segmentation metrics from integer pixel counts, one (intersection, union) pair per example.

Every figure is a percentage. Counts are kept per example and summed as integers, so a figure cannot depend on batch
size, padding, number of devices or order. Protocols: spec of the data set, section "Metrics" (squash, original, gres).
"""

import math
from collections.abc import Sequence

import numpy as np

PROTOCOLS = ("squash", "original", "gres")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
RIGHT = 0.5  # IoU from which an expression counts as understood.


def count_overlap(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Pixels in the intersection and in the union of two masks of one shape."""
    prediction, truth = prediction.astype(bool), truth.astype(bool)
    return int(np.sum(prediction & truth)), int(np.sum(prediction | truth))


def referring(intersection: np.ndarray, union: np.ndarray) -> dict[str, float | int]:
    """oIoU, mIoU and Pr@X of N examples; an empty union counts as IoU 0.

    Args: intersection, union: integers [N], pixels.
    """
    iou = _iou(intersection, union)
    return {
        "oIoU": _percent(_total(intersection), _total(union)),
        "mIoU": _percent(math.fsum(iou), len(iou)),
        # I/U is the double nearest to the ratio, so is the literal 0.6: `>=` is exact at the thresholds.
        **{f"Pr@{x}": _percent(int(np.sum(iou >= x)), len(iou)) for x in THRESHOLDS},
        "count": len(iou),
    }


def generalised(
    intersection: np.ndarray, union: np.ndarray, has_target: np.ndarray, predicted_none: np.ndarray
) -> dict[str, float | int | None]:
    """gIoU, cIoU, N-acc and T-acc of N examples some of which may have no target (gRefCOCO's protocol).

    Args:
      intersection, union: integers [N], pixels of the raw prediction and the truth.
      has_target: bool [N], whether the expression refers to anything.
      predicted_none: bool [N], whether the model says that it refers to nothing.
    N-acc (T-acc) is None where no example is without (with) a target.
    """
    iou = np.where(predicted_none, 0.0, _iou(intersection, union))
    iou = np.where(has_target, iou, np.where(predicted_none, 1.0, 0.0))
    intersection = np.where(has_target & ~predicted_none, intersection, 0)
    # A right "nothing" leaves the sums alone; everything else adds its union (for a miss: the predicted area).
    union = np.where(~has_target & predicted_none, 0, union)
    return {
        "gIoU": _percent(math.fsum(iou), len(iou)),
        "cIoU": _percent(_total(intersection), _total(union)),
        "N-acc": _share(predicted_none[~has_target]),
        "T-acc": _share(~predicted_none[has_target]),
        "count": len(iou),
    }


def by_type(figures, types: Sequence[str], *columns: np.ndarray) -> dict:
    """`figures(*columns)` over everything, plus the same per expression type under "types" ('' is left out)."""
    types = np.asarray(types)
    per_type = {
        str(name): figures(*(column[types == name] for column in columns))
        for name in np.unique(types)
        if name
    }
    return {**figures(*columns), "types": per_type}


def best_constant_mask(counts: np.ndarray, examples: int) -> tuple[np.ndarray, float]:
    """The one mask that, given as the answer to every example, has the highest oIoU, and that oIoU.

    Args: counts [H, W]: how many of the examples have a foreground pixel there; examples: how many there are.
    For a mask of k pixels the union is k * examples + sum(counts) - intersection, so the k most frequent pixels are
    best, and trying every k is exact.
    """
    order = np.argsort(-counts, axis=None, kind="stable")
    intersection = np.cumsum(counts.ravel()[order].astype(np.int64))
    size = np.arange(1, counts.size + 1, dtype=np.int64)
    union = size * examples + int(counts.sum()) - intersection
    best = int(np.argmax(intersection / np.maximum(union, 1)))
    mask = np.zeros(counts.size, bool)
    mask[order[: best + 1]] = True
    return mask.reshape(counts.shape), _percent(int(intersection[best]), int(union[best]))


def _total(values: np.ndarray) -> int:
    return int(np.sum(values, dtype=np.int64))


def _iou(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    return np.where(union > 0, intersection / np.maximum(union, 1), 0.0)


def _percent(part: float, whole: float) -> float:
    return 100.0 * part / whole if whole else 0.0


def _share(right: np.ndarray) -> float | None:
    return _percent(int(right.sum()), len(right)) if len(right) else None
