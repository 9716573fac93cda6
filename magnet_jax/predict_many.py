"""Prediction of many pictures: a list or a folder in, masks and one line of JSON each out; goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from input_pipeline import DataError, Tokenizer, masks, ops
from input_pipeline.jsonl import Question, read_questions
from magnet_jax import visualize
from magnet_jax.errors import UserError
from magnet_jax.predict import Prediction, Predictor, check_texts
from magnet_jax.trained import Trained
from magnet_jax.workdir import write_atomically, write_json

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_RESULTS, _ABOUT = "results.jsonl", "about.json"


def read_input(source: str | Path, texts: Sequence[str]) -> list[Question]:
    """Pictures and sentences: of a .jsonl file its own, of a folder every picture in it with each of `texts`.

    Raises UserError or DataError where there is nothing to do.
    """
    source = Path(source)
    if not source.is_dir():
        if texts:
            raise UserError(
                "--input is a list with sentences of its own; leave --text away, or give a folder"
            )
        return read_questions(source)
    check_texts(texts)
    images = sorted(path for path in source.iterdir() if path.suffix.lower() in _ENDINGS)
    if not images:
        raise UserError(f"--input is '{source}', which has no picture ({', '.join(_ENDINGS)})")
    return [Question(image, text, image.name) for image in images for text in texts]


def fingerprint(trained: Trained) -> str:
    """Of a network and its parameters."""
    found = hashlib.sha256(json.dumps(trained.config.model.to_dict(), sort_keys=True).encode())
    for leaf in jax.tree.leaves(trained.variables):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


def predict_many(
    workdir: str,
    source: str,
    texts: Sequence[str],
    output: str,
    config: ConfigDict | None = None,
    batch_size: int = 8,
) -> int:
    """Writes `output/results.jsonl`, a line for each pair in order, and `output/masks/NUMBER.png`; returns how many failed.

    A line has image and text (and id) as they were given, score, area (share of the picture) and the mask as COCO's RLE, or
    the reason why the picture could not be read. The same command goes on where a former one ended. Raises UserError where
    `output` is of another network or another list.
    """
    questions, folder = read_input(source, texts), Path(output)
    predictor = Predictor.from_pretrained(workdir, config)
    listed = json.dumps([(str(question.image), *question[1:]) for question in questions])
    about = {
        "network": fingerprint(predictor.trained),
        "list": hashlib.sha256(listed.encode()).hexdigest()[:16],
    }
    file = folder / _ABOUT
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--output is '{folder}', which has other files; give a folder that is new")
        write_json(file, about)
    there = json.loads(file.read_text())
    for what, value in about.items():
        if there.get(what) != value:
            raise UserError(f"'{folder}' has predictions of another {what}; give another --output")
    results = folder / _RESULTS
    done = _whole_lines(results)
    if done:
        print(f"{len(done)} of {len(questions)} are there already", flush=True)
    if len(done) < len(questions):
        print("compiling the network (some 10 s to some minutes, by size) ...", flush=True)
    failed = sum("error" in line for line in done)
    with results.open("a", encoding="utf-8") as lines:
        found = _answers(predictor, questions[len(done) :], batch_size)
        for number, (question, answer) in enumerate(
            tqdm(found, "predicting", len(questions), initial=len(done), unit=" pairs", delay=5), len(done)
        ):
            line: dict[str, Any] = {"number": number, "image": question.name, "text": question.text}
            if question.id is not None:
                line["id"] = question.id
            if isinstance(answer, Prediction):
                name = f"masks/{number:06d}.png"
                write_atomically(folder / name, visualize.encode_png(answer.mask.astype(np.uint8) * 255))
                rle = masks.encode(answer.mask.astype(np.uint8))
                counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
                rle = {"size": list(map(int, rle["size"])), "counts": counts}
                if answer.present is not None:
                    line["present"] = answer.present
                line |= {"score": answer.score, "area": float(answer.mask.mean()), "mask": name, "rle": rle}
            else:
                failed += 1
                line["error"] = str(answer)
                print(f"warning: {answer}", file=sys.stderr)
            lines.write(json.dumps(line) + "\n")
            lines.flush()
    print(f"{len(questions)} predictions in '{results}'" + (f", {failed} of them failed" if failed else ""))
    return failed


def _answers(
    predictor: Predictor, questions: Sequence[Question], batch_size: int
) -> Iterator[tuple[Question, Prediction | DataError]]:
    """Of each in order its prediction, or why there is none."""
    for start in range(0, len(questions), batch_size):
        some = questions[start : start + batch_size]
        opened = [_opened(question, predictor.trained.tokenizer) for question in some]
        whole = [
            (image, question.text)
            for image, question in zip(opened, some, strict=True)
            if isinstance(image, Image.Image)
        ]
        predictions = iter(predictor.predict_pairs(whole, batch_size))
        for image, question in zip(opened, some, strict=True):
            yield question, image if isinstance(image, DataError) else next(predictions)


def _opened(question: Question, tokenizer: Tokenizer) -> Image.Image | DataError:
    try:
        tokenizer.encode([question.text])  # Refuses what has no words, of which some is not even white space.
        return ops.open_image(question.image, upright=True)
    except DataError as error:
        return error


def _whole_lines(path: Path) -> list[dict]:
    """What a former run wrote; a last line that was being written when it was killed is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        write_atomically(path, whole)
    return [json.loads(line) for line in whole.splitlines()]
