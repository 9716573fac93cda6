"""What a REFER tree must have, what of it is there, and where the rest comes from. Nothing is downloaded here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from input_pipeline import grefcoco, refer

_ARCHIVE = "https://web.archive.org/web"
_HOST = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"
# Where the annotations of each data set are found: the host of REFER is gone, the Internet Archive has its files.
ORIGINS = {
    "refcoco": f"{_ARCHIVE}/20220413011718/{_HOST}/refcoco.zip",
    "refcoco+": f"{_ARCHIVE}/20220413011656/{_HOST}/refcoco+.zip",
    "refcocog": f"{_ARCHIVE}/20220413012904/{_HOST}/refcocog.zip",
    "grefcoco": "https://github.com/henghuiding/gRefCOCO",
}
PICTURES = "http://images.cocodataset.org/zips/train2014.zip"
PARTITIONS = refer.PARTITIONS | {"grefcoco": grefcoco.PARTITIONS}


def references(dataset: str, partition: str) -> str:
    """The name of a partition's file."""
    return f"grefs({partition}).json" if dataset == "grefcoco" else f"refs({partition}).p"


def data_sets(root: Path) -> list[str]:
    """The data sets that have a folder."""
    return [dataset for dataset in PARTITIONS if (root / dataset).is_dir()]


@dataclasses.dataclass
class Layout:
    """What is there of some data sets.

    `partitions` can be read (data set -> partitions); `missing` are lines of what is needed and absent, with where it
    comes from; `notes` of what is there, and of what is absent and not needed.
    """

    partitions: dict[str, list[str]]
    missing: list[str]
    notes: list[str]


def look(root: Path, datasets: list[str], partition: str | None = None) -> Layout:
    """Looks for the files and folders of data sets; of a partition, where one is given, else of any."""
    found = Layout({}, [], [])
    for dataset in datasets:
        folder = root / dataset
        instances = (folder / refer.INSTANCES).is_file()
        _note(found, folder / refer.INSTANCES, instances, dataset)
        wanted = [name for name in PARTITIONS[dataset] if partition in (None, name)]
        there = [name for name in wanted if (folder / references(dataset, name)).is_file()]
        for name in wanted:
            path = folder / references(dataset, name)
            if name not in there and there:
                found.notes.append(f"{path}: not there, which only partition '{name}' needs")
            else:
                _note(found, path, name in there, dataset)
        if instances and there:
            found.partitions[dataset] = there
    pictures = [root / refer.IMAGES / year for year in ("train2014", "train2017")]
    folders = [folder for folder in pictures if folder.is_dir()]
    found.notes += [f"{folder}: there" for folder in folders]
    if not folders:
        found.missing.append(
            f"{pictures[0]} (or train2017): missing; {PICTURES} has it: unzip train2014.zip -d {root / refer.IMAGES}"
        )
    return found


def _note(found: Layout, path: Path, there: bool, dataset: str) -> None:
    if there:
        found.notes.append(f"{path}: there")
    else:
        how = (
            f"unpack it in {path.parent.parent}"
            if ORIGINS[dataset].endswith(".zip")
            else "it is linked there"
        )
        found.missing.append(f"{path}: missing; from {ORIGINS[dataset]} ({how})")


def recipe(root: Path) -> str:
    """All that there is to do before RefCOCO can be trained on."""
    names = {dataset: [references(dataset, name) for name in PARTITIONS[dataset]] for dataset in PARTITIONS}
    lines = [
        f"  {root / dataset}/{{{', '.join([*names[dataset], refer.INSTANCES])}}}" for dataset in PARTITIONS
    ]
    tree = "\n".join(lines)
    origins = "\n".join(f"  {dataset:9} {origin}" for dataset, origin in ORIGINS.items())
    return f"""\
How the data must lie; one data set is enough, and of G-Ref and RefCOCO one of the refs files:

{tree}
  {root / refer.IMAGES}/train2014/COCO_train2014_000000000009.jpg ...

1. Get the annotations. The host that published REFER is gone; the Internet Archive has copies, gRefCOCO's files
   (grefs(unc).json and instances.json) are linked from the page of its authors:

{origins}

2. Get the pictures: COCO's train2014, which all of them use (13 GB); train2017 has the same pictures and will do, in
   {root / refer.IMAGES}/train2017:

  {PICTURES}

   Nothing is downloaded for you: mind the licences of the data.

3. Unpack (of the first line, what you have):

  unzip refcoco.zip -d {root}; unzip refcoco+.zip -d {root}; unzip refcocog.zip -d {root}
  mkdir -p {root / refer.IMAGES}
  unzip train2014.zip -d {root / refer.IMAGES}

4. Check:

  python -m input_pipeline prepare --root={root}

5. Train:

  python main.py --config=configs/refcoco.py --config.data.root={root} --workdir=runs/refcoco
"""
