"""The report of a study, made of nothing but its results: `report.md` and plots beside it."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from magnet_jax.errors import UserError
from magnet_jax.workdir import write_atomically

_CONFIDENCE = 0.95
_MASK_LOSSES = ("train/loss/bce", "train/loss/dice", "train/loss/cross_entropy")
Result = Mapping[str, Any]
Group = dict[int, Result]  # The runs of one variant on one kind of data, by seed.


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval, which one value alone does not have."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.half is None else f"{self.mean:.1f} ± {self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's interval of the mean of independent repeats."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, None)
    half = (
        stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    )
    return Interval(mean, float(half))


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval:
    """Of the differences between runs of the same seed; raises ValueError where no seed has both."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        raise ValueError("no seed in common")
    return interval([values[seed] - reference[seed] for seed in seeds])


def read_results(out: Path) -> dict[str, dict[str, Group]]:
    """Flavour -> variant -> seed -> result.

    Raises UserError where there is nothing, or where repeats are not of one configuration.
    """
    found: dict[str, dict[str, Group]] = collections.defaultdict(dict)
    for file in sorted((out / "results").glob("*.json")):
        result = json.loads(file.read_text())
        group = found[result["flavour"]].setdefault(result["variant"], {})
        for other in group.values():
            if other["config_hash"] != result["config_hash"]:
                raise UserError(
                    f"'{file}' has configuration {result['config_hash']}, another seed of '{result['variant']}' has "
                    f"{other['config_hash']}; delete the older and run it again"
                )
        group[result["seed"]] = result
    if not found:
        raise UserError(f"no results in '{out / 'results'}'; run the study first")
    return {
        flavour: dict(sorted(groups.items(), key=lambda item: _first(item[1])["place"]))
        for flavour, groups in found.items()
    }


def _first(group: Group) -> Result:
    return next(iter(group.values()))


def _label(groups: dict[str, Group], variant: str) -> str:
    return _first(groups[variant])["label"]


def write_report(out: Path) -> Path:
    """Writes `report.md` and its plots; returns the path of the former."""
    results = read_results(out)
    lines = [
        "# Study",
        "",
        "Made by `python -m magnet_jax.study --out=DIR --report` from the files in `results`, one for each run. Figures are "
        "means over seeds with 95 % intervals (Student's t); differences are between runs of one seed, which saw the same "
        "examples in the same order.",
    ]
    for flavour, groups in results.items():
        plot = f"effects{'.' + flavour if len(results) > 1 else ''}.png"
        curve = plot.replace("effects", "curves")
        write_atomically(out / plot, effects_plot(groups))
        write_atomically(out / curve, curves_plot(groups))
        lines += [
            "",
            f"## Data: {flavour}",
            *section(groups),
            "",
            f"![differences]({plot})",
            "",
            f"![training]({curve})",
        ]
    path = out / "report.md"
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def section(groups: dict[str, Group]) -> list[str]:
    """The tables of one kind of data."""
    splits = list(_first(next(iter(groups.values())))["splits"])
    first = splits[0]
    everything = [result for group in groups.values() for result in group.values()]
    lines = ["", "### Results (oIoU; then of the first split)", ""]

    columns: dict[str, Callable[[Result], float]] = {split: _oiou(split) for split in splits}
    columns["mIoU"] = lambda result: result["splits"][first]["squash"]["mIoU"]
    columns["Pr@0.5"] = lambda result: result["splits"][first]["squash"]["Pr@0.5"]
    if all("shuffled_text" in result["splits"][first] for result in everything):
        columns["sentences shuffled"] = lambda result: result["splits"][first]["shuffled_text"]["squash"][
            "oIoU"
        ]
    lines += _table(groups, columns)

    lines += [
        "",
        "### Differences (oIoU)",
        "",
        *_differences(groups, {split: _oiou(split) for split in splits}),
    ]

    types = sorted({name for result in everything for name in result["splits"][first]["squash"]["types"]})
    by_type = {
        name: lambda result, name=name: result["splits"][first]["squash"]["types"][name]["oIoU"]
        for name in types
    }
    if by_type:
        lines += ["", f"### By expression ({first}, oIoU)", "", *_table(groups, by_type)]
        lines += ["", *_differences(groups, by_type)]

    if all(result["counterfactual"] for result in everything):
        words = sorted(_first(next(iter(groups.values())))["counterfactual"][first]["words"])
        both = {split: lambda r, split=split: r["counterfactual"][split]["both"] for split in splits}
        both |= {
            f"{word} ({first})": lambda r, word=word: r["counterfactual"][first]["words"][word]["both"]
            for word in words
        }
        lines += [
            *("", "### Counterfactual pairs", ""),
            "Two sentences that differ in one word and mean two objects of one picture: percentage of pairs of which both "
            "are segmented with an IoU of at least 0.5, by split and by what the word says.",
            *("", *_table(groups, both), "", *_differences(groups, {split: both[split] for split in splits})),
        ]

    guessing = {
        name: group for name, group in groups.items() if all(r.get("hidden_words") for r in group.values())
    }
    if guessing:
        shares = {
            "with its picture": lambda result: result["hidden_words"]["own"],
            "with another": lambda result: result["hidden_words"]["other"],
        }
        lines += [
            *("", f"### Hidden words ({first})", ""),
            "Of every expression one word is hidden: percentage that Mask Grounding guesses with the expression's picture "
            "and object, and with those of another. Where both are the same, it has not learnt to look.",
            *("", *_table(guessing, shares), ""),
            "What its picture adds, in percentage points, by the word that is hidden (the most frequent ones):",
            *("", *_added_by_word(guessing)),
        ]

    lines += ["", "### What helped, and what did not", "", *verdicts(groups, columns[first], f"{first} oIoU")]
    lines += ["", "### Compute", "", *_compute(groups)]
    return lines


def _added_by_word(groups: dict[str, Group], most: int = 30) -> list[str]:
    """A row for each word; runs hide the same words of the same sentences."""

    def added(result: Result, word: str) -> float:
        figures = result["hidden_words"]["words"][word]
        return figures["own"] - figures["other"]

    lines = [
        f"| | times | {' | '.join(_label(groups, variant) for variant in groups)} |",
        f"|---|---|{'---|' * len(groups)}",
    ]
    for word, figures in list(_first(next(iter(groups.values())))["hidden_words"]["words"].items())[:most]:
        cells = [
            str(interval([added(result, word) for result in group.values()])) for group in groups.values()
        ]
        lines.append(f"| {word} | {figures['count']} | {' | '.join(cells)} |")
    return lines


def _oiou(split: str) -> Callable[[Result], float]:
    return lambda result: result["splits"][split]["squash"]["oIoU"]


def _values(group: Group, figure: Callable[[Result], float]) -> dict[int, float]:
    return {seed: figure(result) for seed, result in group.items()}


def _table(groups: dict[str, Group], columns: Mapping[str, Callable[[Result], float]]) -> list[str]:
    rows = []
    for variant, group in groups.items():
        cells = [str(interval(list(_values(group, figure).values()))) for figure in columns.values()]
        rows.append(f"| {_label(groups, variant)} | {len(group)} | {' | '.join(cells)} |")
    return [f"| | seeds | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}", *rows]


def _compared(groups: dict[str, Group]) -> dict[str, str]:
    """Variant -> its reference, where both are there and share a seed."""
    return {
        variant: reference
        for variant in groups
        if (reference := _first(groups[variant])["reference"]) in groups
        and groups[variant].keys() & groups[reference].keys()
    }


def _differences(groups: dict[str, Group], columns: Mapping[str, Callable[[Result], float]]) -> list[str]:
    rows = []
    for variant, reference in _compared(groups).items():
        cells = [
            f"{'+' if (d := paired(_values(groups[variant], f), _values(groups[reference], f))).mean >= 0 else ''}{d}"
            for f in columns.values()
        ]
        rows.append(f"| {_label(groups, variant)} − {_label(groups, reference)} | {' | '.join(cells)} |")
    return [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}", *rows]


def verdicts(groups: dict[str, Group], figure: Callable[[Result], float], name: str) -> list[str]:
    """One sentence a variant: better, worse, or not told apart."""
    lines = []
    for variant, reference in _compared(groups).items():
        found = paired(_values(groups[variant], figure), _values(groups[reference], figure))
        labels = f"**{_label(groups, variant)}** against {_label(groups, reference)}"
        if found.half is None:
            verdict = f"one seed only ({found.mean:+.1f}), which says nothing"
        elif found.mean - found.half > 0:
            verdict = f"helped: {found.mean:+.1f} ± {found.half:.1f}"
        elif found.mean + found.half < 0:
            verdict = f"did harm: {found.mean:+.1f} ± {found.half:.1f}"
        else:
            verdict = f"no effect shown: {found.mean:+.1f} ± {found.half:.1f} includes zero"
        lines.append(f"- {labels}, {name}: {verdict}.")
    return lines


def _compute(groups: dict[str, Group]) -> list[str]:
    rows = []
    for variant, group in groups.items():
        one = _first(group)
        rates = [result["steps_per_second"] for result in group.values()]
        minutes = [result["steps"] / result["steps_per_second"] / 60 for result in group.values()]
        cells = [
            f"{one['parameters'] / 1e6:.2f}",
            f"{one['steps']} of {one['batch_size']}",
            f"{one['flops_per_step'] / 1e9:.2f}",
            f"{one['flops_per_step'] * one['steps'] / 1e12:.1f}",
            f"{np.median(rates):.2f}",
            f"{np.median(minutes):.1f}",
        ]
        rows.append(f"| {_label(groups, variant)} | {' | '.join(cells)} |")
    head = "M parameters | steps | GFLOP a step | TFLOP | steps/s | minutes"
    return [f"| | {head} |", "|---|---|---|---|---|---|---|", *rows]


def effects_plot(groups: dict[str, Group]) -> bytes:
    """A PNG: the difference of each variant from its reference, by split, with intervals."""
    from matplotlib.figure import Figure  # Slow to import.

    compared = _compared(groups)
    splits = list(_first(next(iter(groups.values())))["splits"])
    figure = Figure(figsize=(9, 1.5 + 0.55 * max(len(compared), 1)), layout="constrained")
    axes = figure.subplots()
    for number, split in enumerate(splits):
        figure_of = _oiou(split)
        found = [
            paired(_values(groups[variant], figure_of), _values(groups[reference], figure_of))
            for variant, reference in compared.items()
        ]
        y = np.arange(len(found)) + 0.15 * (number - (len(splits) - 1) / 2)
        halves = [each.half or 0.0 for each in found]
        axes.errorbar([each.mean for each in found], y, xerr=halves, fmt="o", capsize=3, label=split)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(
        range(len(compared)), [f"{_label(groups, v)}\n− {_label(groups, r)}" for v, r in compared.items()]
    )
    axes.invert_yaxis()
    axes.set_xlabel("difference in oIoU, points (95 % interval over seeds)")
    if compared:
        axes.legend()
    return _png(figure)


def mask_losses(groups: dict[str, Group]) -> dict[str, tuple[list[int], list[float]]]:
    """Of each variant the steps that all runs tell of, and the loss of the masks there, mean over seeds."""
    told = {
        (variant, seed): {
            row["step"]: sum(terms)
            for row in result["history"]
            if (terms := [row[key] for key in _MASK_LOSSES if key in row])
        }
        for variant, group in groups.items()
        for seed, result in group.items()
    }
    steps = sorted(set.intersection(*(set(losses) for losses in told.values())))
    return {
        variant: (steps, [float(np.mean([told[variant, seed][step] for seed in group])) for step in steps])
        for variant, group in groups.items()
    }


def curves_plot(groups: dict[str, Group]) -> bytes:
    """A PNG: the loss of the masks against the steps that all runs tell of, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for variant, (steps, losses) in mask_losses(groups).items():
        axes.plot(steps, losses, label=_label(groups, variant))
    axes.set(xlabel="step", ylabel="loss of the masks", yscale="log")
    axes.legend()
    return _png(figure)


def _png(figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()
