"""How fast and how large the pipeline is: against bare decoding of the same files, and at its start."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from configs import common
from input_pipeline import Augmentation, Loader, Records, Tokenizer, load, load_split, ops, refer
from input_pipeline.writers import write_refer

# RefCOCO (UNC): references by split, and of all together images, annotations and sentences (data spec section 1).
_REFS = {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810}
_IMAGES, _ANNOTATIONS, _SENTENCES = 19994, 196771, 142210


def peak_memory() -> float:
    """The most memory that this process ever had, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # What Linux tells getrusage is at least what the process had that started this one.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def bare_rate(records: Records, rows: Sequence[int], size: tuple[int, int], workers: int) -> float:
    """Images per second of Pillow alone, decoding and resizing the pictures of some rows with that many threads."""
    images = [records.images[int(row)] for row in records.image_rows[np.asarray(rows)]]
    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        for _ in pool.map(lambda image: ops.prepare_image(image, size), images):
            pass
        return len(images) / (time.perf_counter() - start)


def throughput_report(config: ConfigDict | None, batches: int, repeats: int) -> Iterator[str]:
    """Lines on the speed and memory of a configuration's training data; without one, of pictures of COCO's size."""
    with tempfile.TemporaryDirectory() as folder:
        if config is None:
            config = common.get_config()
            config.data.source, config.data.root = "refer", str(Path(folder) / "tree")
            write_refer({"train": load("shapes", "train", scenes=96, image_size=560)}, config.data.root)
        data = config.data
        workers = data.workers or os.cpu_count() or 1
        records, tokenizer = load_split(data, data.split), Tokenizer(data.vocab, data.max_words)

        def make_loader() -> Loader:
            return Loader(
                records,
                tokenizer,
                batch_size=data.batch_size,
                image_size=(data.image_size, data.image_size),
                train=True,
                augmentation=Augmentation(**data.augment.to_dict()),
                max_bad_share=data.max_bad_share,
                workers=workers,
                cache_bytes=0,
            )

        found = throughput(make_loader, workers, batches, repeats)
    yield f"bare decoding and resizing, {workers} threads: {found['bare']:.0f} images/s"
    yield (
        f"loader, batches of {data.batch_size} at {data.image_size} px: {found['loader']:.0f} images/s, "
        f"{100 * found['loader'] / found['bare']:.0f} % of that"
    )
    yield (
        f"peak memory: {found['memory_first']:.0f} MB after {batches // 10} batches, {found['memory_last']:.0f} MB after "
        f"{batches}"
    )


def start_up_report() -> Iterator[str]:
    """Lines on time and memory of a start on as much metadata as RefCOCO has."""
    with tempfile.TemporaryDirectory() as folder:
        write_large_tree(Path(folder))
        for what in ("first start, which parses the files", "later starts"):
            sentences, seconds, memory = start_up(Path(folder))
            yield f"{what}: {sentences} sentences in {seconds:.1f} s, {memory:.0f} MB at most"


def throughput(
    make_loader: Callable[[], Loader], workers: int, batches: int, repeats: int = 3
) -> dict[str, float]:
    """Images per second, bare and through the loader, measured in turn on the same pictures; medians.

    Also 'memory_first' and 'memory_last': peak memory in MB after a tenth of the last repeat's batches and after all.
    """
    bare, ours, memory = [], [], 0.0
    for _ in range(repeats):
        loader = make_loader()
        rows = np.concatenate([loader.rows(step) for step in range(min(batches, 50))])
        bare.append(bare_rate(loader.records, rows, loader.image_size, workers))
        stream = iter(loader)
        next(stream)  # Starting is no part of the speed.
        start = time.perf_counter()
        counted = tqdm(range(batches), "loading", unit=" batches", file=sys.stderr)
        for number, _ in zip(counted, stream, strict=False):
            if number == batches // 10:
                memory = peak_memory()
        ours.append(batches * loader.batch_size / (time.perf_counter() - start))
        stream.close()
    return {
        "bare": statistics.median(bare),
        "loader": statistics.median(ours),
        "memory_first": memory,
        "memory_last": max(memory, peak_memory()),  # Linux's figure may fall by some pages.
    }


def write_large_tree(root: Path, seed: int = 0) -> None:
    """A REFER tree with as much metadata as RefCOCO (UNC), and no pictures."""
    rng = np.random.default_rng(seed)
    folder = root / "refcoco"
    folder.mkdir(parents=True)
    (root / refer.IMAGES / "train2014").mkdir(parents=True)
    images = [
        {"id": i, "file_name": f"{refer.PREFIX}{i:012d}.jpg", "height": 480, "width": 640}
        for i in range(1, _IMAGES + 1)
    ]
    of_image = rng.integers(1, _IMAGES + 1, _ANNOTATIONS)
    annotations = []
    angles = np.linspace(0, 2 * np.pi, 26, endpoint=False)
    for number in range(_ANNOTATIONS):
        x, y, radius = rng.uniform(60, 420, 3) * (1, 0.8, 0.2)
        points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], -1).round(2)
        annotations.append(
            {
                "id": number + 1,
                "image_id": int(of_image[number]),
                "category_id": 1,
                "iscrowd": 0,
                "area": 1.0,
                "bbox": [x, y, radius, radius],
                "segmentation": [points.ravel().tolist()],
            }
        )
    (folder / refer.INSTANCES).write_text(json.dumps({"images": images, "annotations": annotations}))
    del annotations
    counts = np.full(sum(_REFS.values()), _SENTENCES // sum(_REFS.values()))
    counts[: _SENTENCES - counts.sum()] += 1
    splits = itertools.chain.from_iterable(itertools.repeat(name, n) for name, n in _REFS.items())
    (folder / "refs(unc).p").write_bytes(
        pickle.dumps(list(_references(counts, splits, of_image)), protocol=2)
    )


def _references(counts: np.ndarray, splits: Iterator[str], of_image: np.ndarray) -> Iterator[dict]:
    sentence = 0
    for number, (count, split) in enumerate(zip(counts, splits, strict=True)):
        sentences = []
        for _ in range(count):
            words = f"the person number {sentence} in a red shirt left"
            sentences.append({"raw": words, "sent": words, "sent_id": sentence, "tokens": words.split()})
            sentence += 1
        yield {
            "ref_id": number,
            "ann_id": number + 1,
            "image_id": int(of_image[number]),
            "category_id": 1,
            "file_name": f"{refer.PREFIX}{of_image[number]:012d}_{number}.jpg",
            "split": split,
            "sent_ids": [entry["sent_id"] for entry in sentences],
            "sentences": sentences,
        }


_START = """
import sys, time
start = time.perf_counter()
from input_pipeline import Tokenizer, benchmark, load, splits
tokenizer = Tokenizer("shapes")
found = [load("refer", split, root=sys.argv[1]) for split in splits("refer")]
for records in found:
    tokenizer.encode(records.texts)
print(sum(map(len, found)), time.perf_counter() - start, benchmark.peak_memory())
"""


def start_up(root: Path) -> tuple[int, float, float]:
    """Sentences, seconds and peak memory in MB of a process that loads all of a REFER tree and encodes its sentences."""
    command = [sys.executable, "-c", _START, str(root)]
    package_root = Path(__file__).resolve().parent.parent
    ended = subprocess.run(command, capture_output=True, text=True, cwd=package_root, check=True)
    sentences, seconds, memory = ended.stdout.split()
    return int(sentences), float(seconds), float(memory)
