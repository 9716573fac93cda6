"""Two trained networks side by side: how often one understands what the other does not, and pictures of it.

python -m magnet_jax.compare --runs=study/runs/mixed.lavt.0,study/runs/mixed.all.0 --labels=LAVT,MagNet --output=compare.png
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from magnet_jax.errors import UserError
from magnet_jax.metrics import RIGHT

if TYPE_CHECKING:
    from input_pipeline import Records
    from magnet_jax.trained import Trained


def groups(ious: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Expressions by who understands them, each group's hardest first.

    ious `[2, N]`, NaN where an expression could not be read, which is then in no group -> rows of each group. Hardest is
    where who is wrong has the least IoU; of what both understand, where both together have the least.
    """
    first, second = ious >= RIGHT
    read = ~np.isnan(ious).any(0)
    found = {
        f"{labels[0]} wrong, {labels[1]} right": (~first & second & read, ious[0]),
        f"{labels[0]} right, {labels[1]} wrong": (first & ~second & read, ious[1]),
        "both wrong": (~first & ~second & read, ious.sum(0)),
        "both right": (first & second, ious.sum(0)),
    }
    order = {name: np.argsort(hardness, kind="stable") for name, (_, hardness) in found.items()}
    return {name: order[name][members[order[name]]] for name, (members, _) in found.items()}


def load_both(runs: Sequence[str]) -> list[Trained]:
    """The two networks; raises UserError where they are not two, or were not trained for the same data."""
    from magnet_jax.trained import load_trained

    if len(runs) != 2:
        raise UserError(f"--runs has {len(runs)} run directories; give two, separated by a comma")
    both = [load_trained(run) for run in runs]
    for field in ("source", "root", "options", "seed", "image_size"):
        first, second = (_of_data(trained, field) for trained in both)
        if first != second:
            raise UserError(
                f"'{runs[0]}' and '{runs[1]}' differ in config.data.{field} ({first}, {second}); "
                "give two runs on one data set"
            )
    return both


def _of_data(trained: Trained, field: str):
    value = trained.config.data[field]
    # Where a copy is kept makes no other data.
    return {k: v for k, v in value.items() if k != "cache_dir"} if field == "options" else value


def draw(
    both: Sequence[Trained], records: Records, rows: Sequence[int], labels: Sequence[str]
) -> list[np.ndarray]:
    """Panels of some expressions: image, truth, and what both make of it."""
    from input_pipeline import examples
    from magnet_jax.predict import Predictor
    from magnet_jax.visualize import panel

    predictors = [Predictor(trained) for trained in both]
    panels = []
    for row in rows:
        picture = examples.picture(records, records.image_rows[row])
        truth = examples.truth(records, records.objects[row]).astype(bool)
        found = [predictor.predict(picture, [records.texts[row]])[0].mask for predictor in predictors]
        predictions = dict(zip(labels, found, strict=True))
        panels.append(panel(np.asarray(picture), records.texts[row], truth, predictions, side=160))
    return panels


def compare(
    runs: Sequence[str], labels: Sequence[str], split: str, count: int, output: str
) -> dict[str, int]:
    """Prints how many expressions of a split each understands alone, and draws the hardest of each kind, `count` of them.

    Raises UserError as `load_both`, and for an output that is not a PNG.
    """
    from input_pipeline import load_split
    from magnet_jax.evaluate import expression_ious
    from magnet_jax.predict import png_output
    from magnet_jax.visualize import encode_png, sheet
    from magnet_jax.workdir import write_atomically

    path, labels = png_output(output), list(labels) or [Path(run).name for run in runs]
    if len(labels) != len(runs) or len(set(labels)) != len(labels):
        raise UserError(f"--labels is '{','.join(labels)}'; give a name of its own to each of the runs")
    both = load_both(runs)
    files = [Path(run) / "compared" / f"{split}.csv" for run in runs]
    ious = np.stack([expression_ious(*each) for each in zip(both, [split] * 2, files, strict=True)])
    records = load_split(both[0].config.data, split)
    found = groups(ious, labels)
    panels = []
    for name, rows in found.items():
        share = 100 * len(rows) / max(sum(map(len, found.values())), 1)
        print(f"{name}: {len(rows)} expressions of {split}, {share:.1f} %", flush=True)
        panels += draw(both, records, rows[:count], labels)
    if not panels:
        raise UserError(f"no expression of split '{split}' could be read")
    write_atomically(path, encode_png(sheet(panels, columns=min(count, 2))))
    print(f"the hardest of each, in this order: '{path}'")
    return {name: len(rows) for name, rows in found.items()}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 and one line on stderr where it cannot."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    parser = argparse.ArgumentParser(prog="python -m magnet_jax.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", required=True, help="two run directories, separated by a comma")
    parser.add_argument("--labels", default="", help="their names, separated by a comma")
    parser.add_argument("--split", default="val", help="of the data that both were trained on")
    parser.add_argument("--count", type=int, default=2, help="pictures of each kind")
    parser.add_argument("--output", default="compare.png")
    arguments = parser.parse_args(argv)
    from input_pipeline import DataError

    try:
        if arguments.count < 1:
            raise UserError(f"--count is {arguments.count}; expected 1 or more")
        labels = arguments.labels.split(",") if arguments.labels else []
        compare(arguments.runs.split(","), labels, arguments.split, arguments.count, arguments.output)
    except (UserError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
