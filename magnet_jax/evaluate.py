"""Evaluation of one split: every protocol, every expression type, and the two controls.

The controls belong to each figure: `shuffled_text`, the same model given the sentences of other pairs (what it scores
without language), and `constant_mask`, the best single answer to all examples (what it scores without looking).
"""

import csv
import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

import input_pipeline
from input_pipeline import Loader, Records, Tokenizer, masks
from input_pipeline.device import rows_by_process, to_device
from magnet_jax import metrics
from magnet_jax.errors import UserError
from magnet_jax.log import flatten
from magnet_jax.metrics import PROTOCOLS
from magnet_jax.parallelism import jit_eval_step
from magnet_jax.sharding import batch_parts, batch_sharding
from magnet_jax.table import table
from magnet_jax.trained import Trained, load_trained
from magnet_jax.workdir import write_atomically, write_json


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("image", "truth", "prediction"), meta_fields=("text",)
)
@dataclasses.dataclass
class Picture:
    """One example to look at: image uint8 [H, W, 3], truth and prediction bool [H, W]."""

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    text: str = ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Counts:
    """Pixel counts of N examples, one array per column; zero where another process counts."""

    squash: np.ndarray  # int64 [N, 2], intersection and union at the model's size
    original: np.ndarray  # int64 [N, 2], the same at the image's own size
    has_target: np.ndarray  # bool [N]
    predicted_none: np.ndarray  # bool [N]
    counted: np.ndarray  # bool [N], False where an example cannot be read

    @classmethod
    def zeros(cls, n: int) -> "Counts":
        """Nothing counted yet."""
        pair = np.zeros((2, n, 2), np.int64)
        return cls(pair[0], pair[1], *np.zeros((3, n), bool))

    def select(self, rows: np.ndarray) -> "Counts":
        """Those of some examples."""
        return Counts(**{name: column[rows] for name, column in vars(self).items()})


class Evaluator:
    """Evaluates variables on splits; keeps what does not change (records, decoded images, tokens).

    Args:
      eval_step: jit-compiled (variables, batch) -> dict(mask_logits [B,h,w], class_logits [B,2], intersection [B],
        union [B]), with outputs replicated over the mesh.
    """

    def __init__(self, eval_step: Callable, tokenizer: Tokenizer, config: ConfigDict, mesh: Mesh):
        unknown = set(config.eval.protocols) - set(PROTOCOLS)
        if unknown or not config.eval.protocols:
            raise UserError(
                f"config.eval.protocols is {tuple(config.eval.protocols)}; expected some of {PROTOCOLS}"
            )
        self.eval_step, self.tokenizer, self.config, self.mesh = eval_step, tokenizer, config, mesh
        # A class head that was shown no absent object says nothing about absence, whatever it puts out.
        self._asks_class = bool(config.data.get("has_absent") and config.loss.class_)
        held = rows_by_process(batch_sharding(mesh), config.eval.batch_size)
        self._rows = held.pop(jax.process_index())  # Of a batch, those on the devices of this process,
        earlier = [rows for process, rows in held.items() if process < jax.process_index()]
        self._mine = ~np.isin(self._rows, np.concatenate([[], *earlier]))  # and which of these it counts.
        self._prepared = functools.cache(self._prepare)

    def __call__(
        self, variables, split: str, examples: int = 0, panels: int = 0, csv_file: Path | None = None
    ) -> tuple[dict, list[Picture]]:
        """Figures of a split as `{protocol: {...}, "shuffled_text": {protocol: {...}}, "constant_mask": {...}}`.

        Args: examples: how many, evenly spread (0: all); panels: pictures wanted, evenly spread; csv_file: where the
        first process writes a line for every expression.
        """
        records, loader = self._prepared(split, examples)
        n = len(records)
        passes = {"": Counts.zeros(n)}
        if self.config.eval.shuffled_text:
            passes["shuffled_text"] = Counts.zeros(n)
            partner = other_pairs(records.image_rows, self.config.seed)
        chosen = np.linspace(0, n - 1, min(panels, n)).astype(int)
        side = self.config.data.image_size
        pictures = {
            row: Picture(np.zeros((side, side, 3), np.uint8), *np.zeros((2, side, side), bool))
            for row in chosen.tolist()
        }
        foreground = np.zeros((side, side), np.int64)
        waiting = []  # The host counts one batch while the devices run the next.
        silent = jax.process_index() > 0
        # Of a short evaluation nothing is shown.
        for batch in tqdm(
            loader, f"evaluating {split}", len(loader), unit=" batches", delay=20, disable=silent
        ):
            placed = self._placed({k: v for k, v in batch.items() if k != "index"})
            outputs = {"": self.eval_step(variables, placed)}
            if "shuffled_text" in passes:
                rows = partner[np.maximum(batch["index"], 0)]
                text = self._placed({"text_ids": loader.text_ids[rows], "text_mask": loader.text_mask[rows]})
                outputs["shuffled_text"] = self.eval_step(variables, placed | text)
            foreground += batch["mask"][batch["valid"] & self._mine].sum(axis=0, dtype=np.int64)
            waiting.append((batch, outputs))
            if len(waiting) > 1:
                self._count(records, *waiting.pop(0), passes, pictures)
        for entry in waiting:
            self._count(records, *entry, passes, pictures)
        passes, pictures, foreground = _over_processes((passes, pictures, foreground))
        if csv_file is not None and jax.process_index() == 0:
            write_atomically(csv_file, self._lines(records, passes[""]))
        counted = np.flatnonzero(passes[""].counted)
        if not len(counted):
            raise UserError(f"split '{split}': none of its {n} examples can be read; see the warnings above")
        types = [records.types[row] for row in counted]
        results = self._figures(passes[""].select(counted), types)
        if "shuffled_text" in passes:
            results["shuffled_text"] = self._figures(passes["shuffled_text"].select(counted), types)
        mask, figure = metrics.best_constant_mask(foreground, len(counted))
        results["constant_mask"] = {"oIoU": figure, "area": 100.0 * float(mask.mean())}
        if len(counted) < n:
            results["left_out"] = {"count": n - len(counted)}
        shown = [
            dataclasses.replace(picture, text=records.texts[row])
            for row, picture in pictures.items()
            if passes[""].counted[row]
        ]
        return results, shown

    def figure_names(self) -> list[str]:
        """What an evaluation measures, as 'protocol/figure'."""
        one_of_each = dataclasses.replace(Counts.zeros(2), has_target=np.array([True, False]))
        return list(flatten(self._figures(one_of_each, ("", ""))))

    def _prepare(self, split: str, examples: int) -> tuple[Records, Loader]:
        config = self.config
        records = input_pipeline.load_split(config.data, split)
        if not len(records):
            raise UserError(
                f"split '{split}' of data source '{config.data.source}' is empty; name another one"
            )
        if examples and examples < len(records):
            records = records.select(np.linspace(0, len(records) - 1, examples).astype(int))
        loader = Loader(
            records,
            self.tokenizer,
            batch_size=config.eval.batch_size,
            image_size=(config.data.image_size, config.data.image_size),
            seed=config.seed,
            train=False,
            max_bad_share=config.data.max_bad_share,
            share=self._rows,
            prefetch=config.data.prefetch,
            workers=config.data.workers,
        )
        return records, loader

    def _placed(self, batch: dict) -> dict:
        return to_device(batch, batch_sharding(self.mesh), self.config.eval.batch_size)

    def _count(
        self, records: Records, batch: dict, outputs: dict, passes: dict, pictures: dict[int, Picture]
    ) -> None:
        """Adds this process's part of one batch to the counts, and to the pictures those that are wanted."""
        rows = [(i, int(batch["index"][i])) for i in np.flatnonzero(batch["valid"] & self._mine)]
        outputs = {
            name: {k: v[self._rows] for k, v in jax.device_get(output).items()}
            for name, output in outputs.items()
        }
        own_size = self._own_size
        for i, row in rows:
            record = records[row] if own_size else None
            truth = (
                masks.decode(record.segmentation, record.height, record.width, "union") if own_size else None
            )
            for name, output in outputs.items():
                counts, logits = passes[name], output["mask_logits"][i]
                counts.counted[row] = True
                counts.squash[row] = output["intersection"][i], output["union"][i]
                if own_size:
                    prediction = upsample(logits, truth.shape) > 0
                    counts.original[row] = metrics.count_overlap(prediction, truth)
                    counts.has_target[row] = truth.any()
                    absent, present = output["class_logits"][i]
                    told = self._asks_class and absent > present
                    counts.predicted_none[row] = told or not prediction.any()
            if row in pictures:
                prediction = upsample(outputs[""]["mask_logits"][i], batch["mask"][i].shape) > 0
                pictures[row] = Picture(batch["image"][i], batch["mask"][i].astype(bool), prediction)

    def _lines(self, records: Records, counts: Counts) -> bytes:
        """CSV: ids, sentence, and pixels and IoU of 'squash' and 'original', whose pixels 'gres' judges further."""
        pixels = {"squash": counts.squash}
        if self._own_size:
            pixels["original"] = counts.original
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        figures = [f"{name} {figure}" for name in pixels for figure in ("I", "U", "IoU")]
        writer.writerow(["image_id", "object_id", "sentence_id", "sentence", *figures])
        image_ids, object_ids = records.image_ids[records.image_rows], records.object_ids[records.objects]
        for row, sentence in enumerate(records.texts):
            cells = [image_ids[row], object_ids[row], records.sentence_ids[row], sentence]
            for pair in pixels.values():
                if not counts.counted[row]:
                    cells += ["", "", ""]
                    continue
                i, u = pair[row]
                cells += [i, u, f"{i / u if u else 0.0:.6f}"]
            writer.writerow(cells)
        return text.getvalue().encode(errors="replace")  # JSON can hold half a surrogate pair.

    @property
    def _own_size(self) -> bool:
        """Whether a protocol counts at the images' own size."""
        return bool({"original", "gres"} & set(self.config.eval.protocols))

    def _figures(self, counts: Counts, types) -> dict:
        figures = {
            "squash": lambda: metrics.by_type(metrics.referring, types, *counts.squash.T),
            "original": lambda: metrics.by_type(metrics.referring, types, *counts.original.T),
            "gres": lambda: metrics.by_type(
                metrics.generalised, types, *counts.original.T, counts.has_target, counts.predicted_none
            ),
        }
        return {protocol: figures[protocol]() for protocol in self.config.eval.protocols}


def other_pairs(image_rows: np.ndarray, seed: int) -> np.ndarray:
    """For every pair the row of another pair, never itself, each used once; of another image wherever possible.

    Args: image_rows: int [N], the image of each pair.
    Images are put in a random order with their pairs together, and sentences move on by the largest group: that leads
    out of every image as long as none holds more than half of all pairs.
    """
    n = len(image_rows)
    if n < 2:
        return np.arange(n)
    images, group, sizes = np.unique(image_rows, return_inverse=True, return_counts=True)
    order = np.argsort(np.random.default_rng(seed).permutation(len(images))[group], kind="stable")
    partner = np.empty(n, np.int64)
    partner[order] = np.roll(order, -min(int(sizes.max()), n - 1))
    return partner


def upsample(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize of [h, w] to `size` with the corners aligned, as the network does it on the device."""
    rows, columns = (
        _interpolation(source, target) for source, target in zip(logits.shape, size, strict=True)
    )
    return rows @ logits @ columns.T


@functools.lru_cache(maxsize=64)
def _interpolation(source: int, target: int) -> np.ndarray:
    position = np.linspace(0, source - 1, target) if target > 1 else np.zeros(1)
    distance = np.abs(position[:, None] - np.arange(source))
    return np.maximum(0, 1 - distance).astype(np.float32)


def _over_processes(tree):
    """Sums what each process counted; on one process nothing to do."""
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    sums = [multihost_utils.process_allgather(leaf).sum(axis=0, dtype=leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(structure, sums)


def read_ious(csv_file: Path) -> np.ndarray:
    """IoU of every expression under 'squash', from the lines that an evaluation wrote: `[N]`, NaN where it left one out."""
    with csv_file.open(newline="") as lines:
        pixels = [(line["squash I"], line["squash U"]) for line in csv.DictReader(lines)]
    return np.array([int(i) / max(int(u), 1) if u else np.nan for i, u in pixels])


def expression_ious(trained: Trained, split: str, csv_file: Path, **options) -> np.ndarray:
    """IoU of every expression of a split, as `read_ious`; their lines stay in `csv_file`.

    options: of the data source, beside those that the network was trained with.
    """
    config = trained.config.copy_and_resolve_references()
    config.data.options.update(options)
    config.eval.protocols, config.eval.shuffled_text = ("squash",), False
    step = jit_eval_step(trained.network, trained.shardings, trained.mesh)
    Evaluator(step, trained.tokenizer, config, trained.mesh)(trained.variables, split, csv_file=csv_file)
    return read_ious(csv_file)


def evaluate(workdir: str, config: ConfigDict | None = None) -> dict:
    """Evaluates the checkpoint of a run on `config.data.eval_splits`; prints a table and writes `results.json`."""
    trained = load_trained(workdir, config)
    config, mesh = trained.config, trained.mesh
    check_batch_size("eval", config, mesh)
    step = jit_eval_step(trained.network, trained.shardings, mesh)
    evaluator = Evaluator(step, trained.tokenizer, config, mesh)
    results = {
        split: evaluator(
            trained.variables, split, config.eval.examples, csv_file=csv_path(workdir, split, config)
        )[0]
        for split in config.data.eval_splits
    }
    if jax.process_index() == 0:
        write_json(Path(workdir) / "results.json", results)
        print(f"step {trained.step}\n{table(results)}\nresults in '{Path(workdir) / 'results.json'}'")
    return results


def check_batch_size(section: str, config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where the batches of 'data' or 'eval' cannot be divided over the devices."""
    size = config[section].batch_size
    parts = batch_parts(mesh) * (config.train.accumulate if section == "data" else 1)
    if size < 1 or size % parts:
        what = "devices" if parts == batch_parts(mesh) else "devices times config.train.accumulate"
        raise UserError(f"config.{section}.batch_size is {size}; expected a multiple of the {parts} {what}")


def csv_path(workdir: str | Path, split: str, config: ConfigDict) -> Path | None:
    """Where the lines of a split's expressions go, or None."""
    return Path(workdir) / "expressions" / f"{split}.csv" if config.eval.per_expression else None
