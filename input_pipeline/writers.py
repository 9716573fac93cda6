"""Records written in the forms that users have: a REFER tree, TFDS's manual folder or JSON Lines (data spec section 1).

What is written is read by the very code that reads real data. Directories appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from input_pipeline import masks, refer, tfds_manual
from input_pipeline.records import DataError, Record, Records

JPEG_QUALITY = 95
_CATEGORY = 1  # REFER has categories, which nothing here reads.


def write_refer(
    splits: Mapping[str, Records],
    root: str | Path,
    dataset: str = "refcoco",
    partition: str = "unc",
    progress: Callable[[int], None] = lambda expressions: None,
) -> None:
    """Writes a REFER tree: JPEG images, polygons where they are exact and RLE elsewhere, the pickle of references.

    Expression types are kept in a field of their own. `progress` is told how many expressions are done.
    Raises DataError for a split that the partition has not, an object that is not there (REFER cannot say so) and a
    root that is not empty.
    """
    unknown = set(splits) - set(refer.splits(dataset=dataset, partition=partition))
    if unknown:
        raise DataError(f"a REFER tree '{dataset}' ({partition}) has no split {', '.join(sorted(unknown))}")
    refs, images, annotations, done = [], [], [], 0
    with _directory(root) as folder:
        pictures = folder / refer.IMAGES / "train2014"
        pictures.mkdir(parents=True)
        for split, records in splits.items():
            image_ids, object_refs = {}, {}
            for row, record in enumerate(records):
                image_row, object_row = int(records.image_rows[row]), int(records.objects[row])
                if image_row not in image_ids:
                    image_ids[image_row] = len(images) + 1
                    name = f"COCO_train2014_{len(images) + 1:012d}.jpg"
                    (pictures / name).write_bytes(_jpeg(record.image))
                    size = {"height": record.height, "width": record.width}
                    images.append({"id": len(images) + 1, "file_name": name, **size})
                image_id = image_ids[image_row]
                if object_row not in object_refs:
                    number = len(annotations) + 1
                    annotations.append(_annotation(record, number, image_id))
                    object_refs[object_row] = _reference(number, image_id, split)
                    refs.append(object_refs[object_row])
                ref = object_refs[object_row]
                ref["sent_ids"].append(done)
                ref["sentences"].append(_sentence(record, done))
                done += 1
                progress(done)
        (folder / dataset).mkdir()
        (folder / dataset / f"refs({partition}).p").write_bytes(pickle.dumps(refs, protocol=2))
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": _CATEGORY, "name": "shape"}],
        }
        (folder / dataset / "instances.json").write_text(json.dumps(content))


def write_tfds(
    splits: Mapping[str, Records],
    root: str | Path,
    dataset: str = "refcoco",
    partition: str = "unc",
    progress: Callable[[int], None] = lambda expressions: None,
) -> None:
    """Writes the manual folder of TFDS's `ref_coco`, with what `write_refer` would write.

    Raises DataError as `write_refer` does.
    """
    with _directory(root) as folder:
        tree = folder / ".refer"  # On the same disk, so that pictures are linked and not copied.
        write_refer(splits, tree, dataset, partition, progress)
        tfds_manual.write(tree, folder, {dataset: (partition,)})
        shutil.rmtree(tree)


def write_jsonl(
    splits: Mapping[str, Records],
    root: str | Path,
    progress: Callable[[int], None] = lambda expressions: None,
) -> None:
    """Writes `data.jsonl`, a line per object with all its sentences, and the images beside it as they are.

    Raises DataError for a root that is not empty.
    """
    done = 0
    with _directory(root) as folder, open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        (folder / "images").mkdir()
        for split, records in splits.items():
            names, lines = {}, {}
            for row, record in enumerate(records):
                image_row, object_row = int(records.image_rows[row]), int(records.objects[row])
                if image_row not in names:
                    content = _encoded(record.image)
                    suffix = "jpg" if content.startswith(b"\xff\xd8") else "png"
                    names[image_row] = f"images/{split}_{image_row:06d}.{suffix}"
                    (folder / names[image_row]).write_bytes(content)
                if object_row not in lines:
                    line = {"image": names[image_row], **_shape(_mask(record))}
                    lines[object_row] = line | {
                        "text": [],
                        "type": [],
                        "id": f"{split}-{object_row}",
                        "split": split,
                    }
                lines[object_row]["text"].append(record.text)
                lines[object_row]["type"].append(record.type)
                done += 1
                progress(done)
            for line in lines.values():
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` where the block succeeds."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: exists and is not an empty directory; give another one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _encoded(image: str | bytes) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _jpeg(image: str | bytes) -> bytes:
    content = _encoded(image)
    if content.startswith(b"\xff\xd8"):
        return content
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as opened:
        opened.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _mask(record: Record) -> np.ndarray:
    return masks.decode(record.segmentation, record.height, record.width)


def _shape(mask: np.ndarray) -> dict:
    """Polygons where they are exact, else RLE, in JSON's types."""
    polygons = masks.outline(mask)
    if polygons is not None:
        return {"polygons": polygons}
    rle = masks.encode(mask)
    return {"rle": {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()}}


def _annotation(record: Record, number: int, image_id: int) -> dict:
    mask = _mask(record)
    shape = _shape(mask)
    if shape == {"polygons": []}:
        raise DataError(
            f"'{record.text}' means nothing in its image, which a REFER tree cannot say; write JSON Lines"
        )
    segmentation = shape.get("polygons", shape.get("rle"))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": _CATEGORY,
        "iscrowd": 0,
        "segmentation": segmentation,
        **tfds_manual.bounds(mask),
    }


def _reference(number: int, image_id: int, split: str) -> dict:
    return {
        "ref_id": number,
        "ann_id": number,
        "image_id": image_id,
        "category_id": _CATEGORY,
        "file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg",
        "split": split,
        "sent_ids": [],
        "sentences": [],
    }


def _sentence(record: Record, number: int) -> dict:
    plain = record.text.lower()
    fields = {"raw": record.text, "sent": plain, "sent_id": number, "tokens": plain.split()}
    return fields | {"type": record.type}
