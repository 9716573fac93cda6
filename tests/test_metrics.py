"""Metrics against the published systems' figures and against plain loops over pixels."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from magnet_jax import metrics
from tests.metric_values import metric_values

DATA = Path(__file__).parent / "data"


def test_reference_figures():
    expected = json.loads((DATA / "metrics.json").read_text())
    assert metric_values(DATA / "metrics.npz") == pytest.approx(expected, abs=1e-9)


def test_command_prints_json():
    command = [sys.executable, DATA.parent / "metric_values.py", DATA / "metrics.npz"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == metric_values(DATA / "metrics.npz")


def _masks(seed, n=30, side=9):
    rng = np.random.default_rng(seed)
    truth = rng.random((n, side, side)) < rng.random((n, 1, 1))
    prediction = truth ^ (rng.random((n, side, side)) < 0.5 * rng.random((n, 1, 1)))
    truth[0] = prediction[0] = False  # An empty union.
    prediction[1] = False
    truth[2] = False
    return prediction, truth


def test_referring_equals_loops_over_pixels():
    prediction, truth = _masks(0)
    sum_i = sum_u = 0
    ious = []
    for p, t in zip(prediction, truth, strict=True):
        i = u = 0
        for y in range(p.shape[0]):
            for x in range(p.shape[1]):
                i += bool(p[y, x] and t[y, x])
                u += bool(p[y, x] or t[y, x])
        assert metrics.count_overlap(p, t) == (i, u)
        sum_i, sum_u = sum_i + i, sum_u + u
        ious.append(i / u if u else 0.0)
    counts = np.array([metrics.count_overlap(p, t) for p, t in zip(prediction, truth, strict=True)])
    figures = metrics.referring(*counts.T)
    assert figures["oIoU"] == pytest.approx(100 * sum_i / sum_u)
    assert figures["mIoU"] == pytest.approx(100 * sum(ious) / len(ious))
    assert figures["count"] == len(ious)
    for x in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert figures[f"Pr@{x}"] == pytest.approx(100 * sum(iou >= x for iou in ious) / len(ious))


def test_a_threshold_that_is_met_exactly_counts():
    tenths = np.array([5, 6, 7, 8, 9])
    figures = metrics.referring(tenths, np.full(5, 10))
    assert [figures[f"Pr@{x}"] for x in metrics.THRESHOLDS] == [100, 80, 60, 40, 20]


def test_figures_do_not_depend_on_order():
    rng = np.random.default_rng(1)
    union = rng.integers(1, 10_000, 500)
    intersection = rng.integers(0, union + 1)
    order = rng.permutation(500)
    assert metrics.referring(intersection, union) == metrics.referring(intersection[order], union[order])


def test_sums_are_64_bit():
    large = np.full(10, 2**30, np.int32)  # Their sum overflows 32 bits.
    assert metrics.referring(large, large)["oIoU"] == 100.0


def test_generalised_follows_its_definition():
    #          right     half     said none  right none  missed
    i = np.array([8, 4, 6, 0, 0])
    u = np.array([8, 8, 10, 3, 5])
    has_target = np.array([True, True, True, False, False])
    predicted_none = np.array([False, False, True, True, False])
    figures = metrics.generalised(i, u, has_target, predicted_none)
    assert figures["gIoU"] == pytest.approx(100 * (1 + 0.5 + 0 + 1 + 0) / 5)
    # Target said to be none: nothing to I, its union to U. Missed no-target: the predicted area to U.
    assert figures["cIoU"] == pytest.approx(100 * (8 + 4) / (8 + 8 + 10 + 5))
    assert figures["N-acc"] == pytest.approx(50.0)
    assert figures["T-acc"] == pytest.approx(100 * 2 / 3)
    assert figures["count"] == 5


def test_generalised_has_no_accuracy_without_such_examples():
    one = np.ones(3, int)
    figures = metrics.generalised(one, one, np.ones(3, bool), np.zeros(3, bool))
    assert figures["N-acc"] is None
    assert figures["T-acc"] == figures["gIoU"] == 100.0


def test_by_type_covers_each_type_alone():
    i, u = np.array([1, 2, 3, 4]), np.array([2, 2, 6, 4])
    figures = metrics.by_type(metrics.referring, ["place", "order", "place", ""], i, u)
    assert figures["count"] == 4
    assert set(figures["types"]) == {"place", "order"}
    assert figures["types"]["place"] == metrics.referring(i[[0, 2]], u[[0, 2]])


def test_best_constant_mask_beats_every_other():
    truth = np.random.default_rng(2).random((6, 3, 3)) < np.linspace(0.1, 0.9, 9).reshape(3, 3)
    best, figure = metrics.best_constant_mask(truth.sum(0), len(truth))
    every = []
    for bits in range(1, 2**9):
        mask = np.array([bits >> k & 1 for k in range(9)], bool).reshape(3, 3)
        counts = np.array([metrics.count_overlap(mask, t) for t in truth])
        every.append(metrics.referring(*counts.T)["oIoU"])
    counts = np.array([metrics.count_overlap(best, t) for t in truth])
    assert figure == pytest.approx(metrics.referring(*counts.T)["oIoU"])
    assert figure == pytest.approx(max(every))
