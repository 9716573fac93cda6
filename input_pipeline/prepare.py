"""Data sets checked and made ready before training: `python -m input_pipeline prepare` (data spec section 1)."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from input_pipeline import grefcoco, inspect_records, jsonl, prepare_layout, refer, tfds_manual
from input_pipeline import records as registry
from input_pipeline.cache import FOLDER
from input_pipeline.records import DataError, Records

SOURCES = ("refer", "grefcoco", "jsonl", "tfds")
_FEW = 5  # Names that are listed of many.
_Counts = tuple[int | None, int | None, int | None]  # Objects, images, expressions.
_KINDS = ("objects", "images", "expressions")
# As published; None where it is not known.
KNOWN: dict[tuple[str, str], dict[str, _Counts]] = {
    ("refcoco", "unc"): {
        "train": (42404, 16994, 120624),
        "val": (3811, 1500, 10834),
        "testA": (1975, 750, 5657),
        "testB": (1810, 750, 5095),
    },
    ("refcoco+", "unc"): {
        "train": (42278, 16992, 120191),
        "val": (3805, 1500, 10758),
        "testA": (1975, 750, 5726),
        "testB": (1798, 750, 4889),
    },
    ("refcocog", "umd"): {
        "train": (42226, 21899, 80512),
        "val": (2573, 1300, 4896),
        "test": (5023, 2600, 9602),
    },
    ("refcocog", "google"): {"train": (44822, None, None), "val": (5000, None, None)},
}


@dataclasses.dataclass
class Part:
    """One partition of a data set, or one source: the records of its splits, and where its memory is kept."""

    name: str
    splits: dict[str, Records]
    folder: Path | None = None
    known: Mapping[str, _Counts] = dataclasses.field(default_factory=dict)


def run(arguments: argparse.Namespace) -> None:
    """Checks data, writes the parsed form of its annotations and, where asked, TFDS's manual folder.

    Args:
        arguments: source, root, dataset (list), partition, deep, tfds: the flags of the command.
    Raises:
        DataError: where anything is missing or wrong; what it is has been printed then.
    """
    if arguments.tfds and arguments.source != "refer":
        raise DataError(f"--tfds is made of a REFER tree, not of --source={arguments.source}")
    problems: list[str] = []
    if arguments.source == "refer":
        layout, parts = _refer_tree(Path(arguments.root), arguments.dataset, arguments.partition, problems)
    else:
        parts = [_source(arguments)]
    for part in parts:
        print(report(part))
    for problem in problems:
        print(problem)
    count = len(problems)
    if arguments.deep:
        count += _deep(parts)
    if count:
        raise DataError(f"'{arguments.root}': {count} problems, listed above; mend them and run this again")
    if arguments.tfds:
        partitions = {name: names for name, names in layout.partitions.items() if name in refer.PARTITIONS}
        _write_tfds(arguments.root, arguments.tfds, partitions)
    elif arguments.source == "refer":
        print("\nready")
        if any(part.name == "refcoco (unc)" for part in parts):
            root = arguments.root
            print(
                f"  python main.py --config=configs/refcoco.py --config.data.root={root} --workdir=runs/refcoco"
            )


def report(part: Part) -> str:
    """A table of what the splits hold, beside what was published, and a line for each split that differs."""
    rows = [("split", *_KINDS, *(["published"] if part.known else []))]
    notes = []
    for split, records in part.splits.items():
        counts = len(records.segmentations), len(records.images), len(records)
        row = [split, *map(str, counts)]
        if part.known:
            known = part.known[split]
            row.append(" / ".join("-" if number is None else str(number) for number in known))
            differing = [
                f"{count} {kind} ({number})"
                for kind, count, number in zip(_KINDS, counts, known, strict=True)
                if number not in (None, count)
            ]
            if differing:
                notes.append(f"  {split} differs from the published counts: {', '.join(differing)}")
        rows.append(tuple(row))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join([f"\n{part.name}", *lines, *notes])


def _refer_tree(
    root: Path, datasets: list[str] | None, partition: str | None, problems: list[str]
) -> tuple[prepare_layout.Layout, list[Part]]:
    """What is there of a REFER tree; what is not, or cannot be read, is added to `problems`."""
    there = prepare_layout.data_sets(root)
    if not there and root.suffix == ".jsonl":
        raise DataError(f"'{root}': a REFER tree is a folder; for this file give --source=jsonl")
    if not there:
        print(prepare_layout.recipe(root))
        raise DataError(f"'{root}': no data set there; the steps above tell how to get one")
    chosen = [
        dataset
        for dataset in datasets or there
        if partition is None or partition in prepare_layout.PARTITIONS[dataset]
    ]
    if not chosen or (datasets and chosen != datasets):
        raise DataError(
            f"no partition '{partition}' in {', '.join(datasets or there)}; without --partition all that are there are read"
        )
    layout = prepare_layout.look(root, chosen, partition)
    print("\n".join(layout.notes))
    problems += layout.missing
    if not any((root / refer.IMAGES / year).is_dir() for year in ("train2014", "train2017")):
        return layout, []
    parts = []
    pairs = [(dataset, name) for dataset, names in layout.partitions.items() for name in names]
    with tqdm(pairs, "reading annotations", file=sys.stderr) as bar:
        for dataset, name in bar:
            try:
                part = _partition(root, dataset, name)
            except DataError as error:
                problems.append(str(error))
                continue
            parts.append(part)
            problems += _missing_pictures(part, root)
    return layout, parts


def _partition(root: Path, dataset: str, partition: str) -> Part:
    """The records of a partition; loading them leaves them in the parsed form that training reads."""
    folder = root / dataset
    path = folder / prepare_layout.references(dataset, partition)
    options = {"root": str(root), "partition": partition}
    source = "grefcoco" if dataset == "grefcoco" else "refer"
    if source == "refer":
        options["dataset"] = dataset
    splits = {name: registry.load(source, name, **options) for name in registry.splits(source, **options)}
    if not any(map(len, splits.values())):
        raise DataError(f"{path}: no object of any of the splits {', '.join(splits)}")
    return Part(f"{dataset} ({partition})", splits, folder, KNOWN.get((dataset, partition), {}))


def _missing_pictures(part: Part, root: Path) -> list[str]:
    paths = dict.fromkeys(path for records in part.splits.values() for path in records.images)
    missing = [path for path in paths if not os.path.exists(path)]
    if not missing:
        return []
    names = ", ".join(os.path.basename(path) for path in missing[:_FEW])
    return [
        f"{os.path.dirname(missing[0])}: {len(missing)} of the {len(paths)} pictures of {part.name} are missing: {names}"
        f"{', ...' if len(missing) > _FEW else ''}; {prepare_layout.PICTURES} has them: "
        f"unzip -n train2014.zip -d {root / refer.IMAGES}"
    ]


def _source(arguments: argparse.Namespace) -> Part:
    """The records of a source that is no REFER tree."""
    if arguments.dataset and arguments.source != "tfds":
        raise DataError(f"--dataset is of --source=refer and tfds, not of {arguments.source}")
    if arguments.partition and arguments.source == "jsonl":
        raise DataError("--partition is not of --source=jsonl, which has none")
    root = Path(arguments.root)
    if arguments.source == "jsonl":
        wrong = jsonl.wrong_lines(arguments.root)
        if wrong:
            print("\n".join(wrong))
            raise DataError(
                f"'{arguments.root}': {len(wrong)} wrong lines, listed above; mend them and run this again"
            )
    if arguments.source == "grefcoco":
        return _partition(root, "grefcoco", arguments.partition or next(iter(grefcoco.PARTITIONS)))
    options = {}
    if arguments.source == "tfds":
        if len(arguments.dataset or []) > 1:
            raise DataError("--source=tfds takes one --dataset at a time")
        dataset = (arguments.dataset or ["refcoco"])[0]
        first = next(iter(prepare_layout.PARTITIONS[dataset]))
        options = {"dataset": dataset, "partition": arguments.partition or first}
    names = registry.splits(arguments.source, root=arguments.root, **options)
    with tqdm(names, "reading annotations", file=sys.stderr) as bar:
        splits = {name: registry.load(arguments.source, name, root=arguments.root, **options) for name in bar}
    folder = (root if root.is_dir() else root.parent) if arguments.source == "jsonl" else None
    return Part(" ".join([arguments.source, *options.values()]), splits, folder)


def _deep(parts: list[Part]) -> int:
    """Prints every problem of pictures, masks and sentences; returns how many there are."""
    folders: dict[Path | None, list[Part]] = {}
    for part in parts:
        folders.setdefault(part.folder, []).append(part)
    count = 0
    for folder, together in folders.items():
        memory = inspect_records.Memory(folder / FOLDER / inspect_records.MEMORY_FILE if folder else None)
        name, summary = ", ".join(part.name for part in together), inspect_records.Summary()
        splits = [records for part in together for records in part.splits.values()]
        print(f"\nlooking at {name}", flush=True)
        for problem in inspect_records.inspect(splits, memory, summary, name):
            tqdm.write(problem, file=sys.stdout)
        print(summary)
        count += summary.problems
    return count


def _write_tfds(root: str, folder: str, partitions: dict[str, list[str]]) -> None:
    if not partitions:
        raise DataError(
            f"'{root}': TFDS's ref_coco has none of its data sets; it is made of {', '.join(refer.PARTITIONS)}"
        )
    count = tfds_manual.write(
        root, folder, partitions, lambda items, what: tqdm(items, what, file=sys.stderr)
    )
    print(f"\n{count} references in '{folder}'; next, for each data set and partition:")
    for dataset, names in partitions.items():
        for name in names:
            print(
                f"  python -m input_pipeline build_tfds --manual={folder} --root=TFDS_DATA_DIR "
                f"--dataset={dataset} --partition={name}"
            )
