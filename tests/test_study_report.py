"""The report of a study: its statistics, what it says of them, and that the committed one follows from its results."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.ablation import VARIANTS
from magnet_jax import study_report
from magnet_jax.errors import UserError
from magnet_jax.study import Run, is_done, result_file

STUDY = Path(__file__).parents[1] / "docs" / "study"


def result(variant, seed, oiou, **more):
    figures = {"oIoU": oiou, "mIoU": oiou, "Pr@0.5": oiou, "count": 9}
    split = {
        "squash": figures | {"types": {"place": dict(figures, oIoU=oiou + 1)}},
        "shuffled_text": {"squash": {"oIoU": 5.0}},
    }
    pairs = {"both": 40.0, "one": 30.0, "count": 10}
    return {
        "experiment": "x.py",
        "flavour": "mixed",
        "variant": variant,
        "seed": seed,
        "label": VARIANTS[variant].label,
        "reference": VARIANTS[variant].reference,
        "place": list(VARIANTS).index(variant),
        "config_hash": variant,
        "jax": "0",
        "steps": 100,
        "batch_size": 4,
        "parameters": 10,
        "flops_per_step": 2e9,
        "steps_per_second": 2.0,
        "splits": {"val": split, "rare": split},
        "counterfactual": {"val": pairs | {"words": {"color": pairs}}, "rare": pairs | {"words": {}}},
        "history": [{"step": 50, "train/loss/bce": 1.0}, {"step": 100, "train/loss/bce": 0.5}],
    } | more


def write(out, results):
    for one in results:
        file = result_file(out, Run("x.py", one["flavour"], one["variant"], one["seed"]))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(one))


def test_statistics():
    # Student's quantiles for 1 and 2 degrees of freedom from a printed table.
    assert study_report.interval([1.0, 3.0]).half == pytest.approx(12.706 * np.sqrt(2) / np.sqrt(2), rel=1e-4)
    assert study_report.interval([1.0, 2.0, 3.0]).half == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert study_report.interval([7.0]) == (7.0, None)
    # Seeds that only one side has do not count.
    assert study_report.paired({0: 3.0, 1: 5.0, 7: 99.0}, {0: 1.0, 1: 3.0, 8: -99.0}) == (2.0, 0.0)
    with pytest.raises(ValueError, match="no seed in common"):
        study_report.paired({0: 1.0}, {1: 1.0})


def test_report_says_what_helped_and_what_did_not(tmp_path):
    scores = {
        "baseline": (30, 32, 34),
        "mg": (35, 37.5, 39),
        "cam": (30, 33, 33),
        "cal": (20, 21, 25),
        "lavt": (25, 26, 27),
    }
    write(
        tmp_path, [result(name, seed, float(v)) for name, row in scores.items() for seed, v in enumerate(row)]
    )
    text = study_report.write_report(tmp_path).read_text()
    assert "**+ Mask Grounding** against baseline, val oIoU: helped: +5.2 ± 0.7." in text
    assert "**+ CAM** against baseline, val oIoU: no effect shown: +0.0 ± 2.5 includes zero." in text
    assert "**+ alignment loss** against baseline, val oIoU: did harm: -10.0 ± 2.5." in text
    assert "**LAVT**" not in text  # It is compared with nothing that is here.
    assert "| baseline | 3 | 32.0 ± 5.0 | 32.0 ± 5.0 |" in text
    assert "| + Mask Grounding − baseline | +5.2 ± 0.7 |" in text
    assert text.index("| baseline |") < text.index("| + CAM |") < text.index("| LAVT |")
    for name in ("effects.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text
    first = text
    assert study_report.write_report(tmp_path).read_text() == first


def test_report_says_whether_the_hidden_words_are_looked_for(tmp_path):
    """Of the variants that guess any."""
    by_word = {
        "red": {"own": 75.0, "other": 20.0, "count": 5},
        "top": {"own": 50.0, "other": 50.0, "count": 4},
    }
    words = {"own": 60.0, "other": 25.0, "count": 9, "words": by_word}
    write(tmp_path, [result("baseline", 0, 1.0), result("mg", 0, 2.0, hidden_words=words)])
    text = study_report.write_report(tmp_path).read_text()
    section = text[text.index("### Hidden words (val)") : text.index("### What helped")]
    assert "| + Mask Grounding | 1 | 60.0 | 25.0 |" in section
    assert "| | times | + Mask Grounding |\n|---|---|---|\n| red | 5 | 55.0 |\n| top | 4 | 0.0 |\n" in section
    assert "baseline" not in section


def test_curves_are_of_the_steps_that_all_runs_tell_of():
    """One that was stopped and went on may have others besides."""
    row = {"step": 60, "train/loss/bce": 9.0}
    first, second = result("mg", 0, 1.0), result("mg", 1, 1.0)
    first["history"] = [
        first["history"][0],
        row,
        {"step": 100, "train/loss/bce": 0.25, "train/loss/dice": 0.5},
    ]
    found = study_report.mask_losses({"mg": {0: first, 1: second}, "cam": {0: result("cam", 0, 1.0)}})
    assert found == {"mg": ([50, 100], [1.0, 0.625]), "cam": ([50, 100], [1.0, 0.5])}


def test_committed_report_follows_from_the_committed_results(tmp_path):
    """And those are of the configurations as they are now, so that the grid can be gone on with."""
    files = sorted((STUDY / "results").iterdir())
    assert files
    for file in files:
        told = json.loads(file.read_text())
        run = Run(told["experiment"], told["flavour"], told["variant"], told["seed"])
        assert (file.name, is_done(STUDY, run)) == (f"{run.name}.json", True)
    shutil.copytree(STUDY / "results", tmp_path / "results")
    assert study_report.write_report(tmp_path).read_text() == (STUDY / "report.md").read_text()


def test_report_refuses_repeats_of_another_configuration(tmp_path):
    with pytest.raises(UserError, match="no results in"):
        study_report.write_report(tmp_path)
    write(tmp_path, [result("mg", 0, 1.0), result("mg", 1, 1.0, config_hash="other")])
    with pytest.raises(UserError, match=r"mg.1.json' has configuration other, another seed of 'mg' has mg"):
        study_report.write_report(tmp_path)
