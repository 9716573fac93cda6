"""Every picture, mask and sentence of records looked at, before a training of days stumbles over one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import logging
from PIL import ExifTags
from tqdm import tqdm

from input_pipeline import examples
from input_pipeline.records import DataError, Records

MEMORY_FILE = "checked.jsonl"
_CHUNK = 256  # Pictures after which what is known of them is written down.
_SPACES = "\t\n\r"  # Control characters that BERT takes for spaces.


@dataclasses.dataclass
class Summary:
    """What was looked at, as far as it is now."""

    pictures: int = 0
    decoded: int = 0  # The rest were whole the last time, and did not change.
    masks: int = 0
    sentences: int = 0
    problems: int = 0
    turned: int = 0  # Pictures with an EXIF orientation.
    first_turned: str = ""

    def __str__(self) -> str:
        known = self.pictures - self.decoded
        parts = [
            f"{self.pictures} pictures" + (f" ({known} unchanged since the last check)" if known else "")
        ]
        parts += [f"{self.masks} masks", f"{self.sentences} sentences", f"{self.problems} problems"]
        text = ", ".join(parts)
        if self.turned:
            text += (
                f"\n{self.turned} pictures have an EXIF orientation, which is ignored as the annotations want it; "
                f"the first is {self.first_turned}"
            )
        return text


class Memory:
    """Pictures that were whole when they were last looked at, in a file that outlives a killed run.

    Args: path: of the file, to which lines are added; None where pictures are no files.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._entries: dict[str, dict] = {}
        self._torn = False  # Whether the last line was cut off.
        if path is not None and path.exists():
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    self._recall(line)
                    self._torn = not line.endswith("\n")

    def _recall(self, line: str) -> None:
        try:
            entry = json.loads(line)
            self._entries[entry["name"]] = entry
        except (
            ValueError,
            KeyError,
            TypeError,
        ):  # The last line of a killed run: that picture is looked at again.
            return

    def name(self, image: str) -> str:
        """What a picture is called in the file: its path from there, so that the data may move."""
        return os.path.relpath(image, self._path.parent) if self._path else image

    def find(self, state: dict) -> dict | None:
        """What is known of a picture that has not changed since."""
        entry = self._entries.get(state["name"])
        return entry if entry is not None and state.items() <= entry.items() else None

    def add(self, entries: Sequence[dict]) -> None:
        """Remembers pictures, at once and for the next run."""
        self._entries.update((entry["name"], entry) for entry in entries)
        if self._path is None or not entries:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "ab") as file:
                lines = "\n" * self._torn + "".join(json.dumps(entry) + "\n" for entry in entries)
                file.write(lines.encode())
            self._torn = False
        except OSError as error:
            logging.warning(
                "%s: cannot be kept (%s), so the next check starts anew", self._path, error.strerror
            )
            self._path = None


def inspect(splits: Sequence[Records], memory: Memory, summary: Summary, name: str = "") -> Iterator[str]:
    """Looks at everything, with progress on stderr.

    Pictures must decode and have the size that their annotations are for, masks must decode and not be empty, sentences
    must have words and no characters that are damaged or mean nothing.

    Args:
        splits: of one source, so that a picture of COCO is in several of them the same.
        memory: of the pictures that need not be decoded again.
        summary: where everything is counted.
        name: of the data, for the progress bars.
    Yields:
        A line for each problem.
    """
    reported = set()
    found = itertools.chain(
        _pictures(splits, memory, summary, name), _masks(splits, summary, name), _sentences(splits, summary)
    )
    for problem in found:
        if problem not in reported:  # Partitions share objects.
            reported.add(problem)
            summary.problems += 1
            yield problem


def _pictures(splits: Sequence[Records], memory: Memory, summary: Summary, name: str) -> Iterator[str]:
    todo: dict[tuple, tuple[Records, int]] = {}
    for number, records in enumerate(splits):
        for row, image_id in enumerate(records.image_ids.tolist()):
            key = (image_id,) if records.coco else (number, row)
            todo.setdefault(key, (records, row))
    pairs = list(todo.values())
    bar = tqdm(total=len(pairs), desc=f"{name} pictures", file=sys.stderr, unit=" pictures")
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(pairs), _CHUNK):
            fresh = []
            found = pool.map(lambda pair: _picture(*pair, memory), pairs[start : start + _CHUNK])
            for (records, row), (problem, entry, decoded) in zip(
                pairs[start : start + _CHUNK], found, strict=True
            ):
                bar.update()
                summary.pictures += 1
                summary.decoded += decoded
                if problem:
                    yield problem
                    continue
                if decoded and "name" in entry:
                    fresh.append(entry)
                if entry["orientation"] != 1:
                    summary.turned += 1
                    where = f"{examples.name(records, row)} (orientation {entry['orientation']})"
                    summary.first_turned = summary.first_turned or where
            memory.add(fresh)


def _picture(records: Records, row: int, memory: Memory) -> tuple[str, dict, bool]:
    """What is wrong with a picture, what to remember of it, and whether it was decoded."""
    image = records.images[row]
    height, width = map(int, records.sizes[row])
    state: dict = {"height": height, "width": width}
    if isinstance(image, str) and os.path.exists(image):
        status = os.stat(image)  # Before it is read: who changes it meanwhile has it looked at again.
        state |= {"name": memory.name(image), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        known = memory.find(state)
        if known is not None:
            return "", known, False
    try:
        picture = examples.picture(records, row)
    except DataError as error:
        return str(error), {}, True
    try:
        orientation = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Damaged EXIF raises nearly anything, and the pixels are whole.
        orientation = 1
    return "", {**state, "orientation": orientation}, True


def _masks(splits: Sequence[Records], summary: Summary, name: str) -> Iterator[str]:
    total = sum(len(records.segmentations) for records in splits)
    with tqdm(total=total, desc=f"{name} masks", file=sys.stderr, unit=" masks") as bar:
        for records in splits:
            for row in range(len(records.segmentations)):
                if not records.sizes[records.object_images[row]].any():
                    bar.update()  # Its picture is missing, which has been said.
                    continue
                try:
                    examples.truth(records, row, empty=False)
                except DataError as error:
                    yield str(error)
                summary.masks += 1
                bar.update()


def _sentences(splits: Sequence[Records], summary: Summary) -> Iterator[str]:
    for records in splits:
        for row, text in enumerate(records.texts):
            summary.sentences += 1
            problem = text_problem(text)
            if problem:
                where = examples.name(records, int(records.image_rows[row]))
                number = (
                    f"object {records.object_ids[records.objects[row]]}, sentence {records.sentence_ids[row]}"
                )
                yield f"{where}, {number}: {problem}"


def text_problem(text: str) -> str:
    """What is wrong with a sentence; '' where it has words, and only characters that are some."""
    # JSON and Python may hold a character as its two halves, which is no harm.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    kinds = {character: unicodedata.category(character) for character in text}
    for character, kind in kinds.items():
        odd = {
            "Cs": "half a character (a lone surrogate)",
            "Co": "a character of private use",
            "Cc": "a control character",
        }.get(kind)
        if character == "\ufffd":
            odd = "the sign of a character that was lost"
        if odd and character not in _SPACES:
            return f"the sentence {text!a} has {odd}, U+{ord(character):04X}; mend it"
    # What BERT's cleaning leaves out: control characters, spaces, accents that stand alone.
    if all(kind[0] in "CZ" or kind == "Mn" for kind in kinds.values()):
        return f"the sentence {text!a} has no words; write what to look for"
    return ""
