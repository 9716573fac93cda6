"""Pictures: overlays, panels (image, truth, prediction) and the curves of a run."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CAPTION, _MARGIN = 34, 4  # Heights in pixels.
_TRUTH, _PREDICTION = (40, 180, 70), (230, 60, 40)


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = _PREDICTION) -> np.ndarray:
    """An image uint8 [H, W, 3] with the mask bool [H, W] tinted and outlined."""
    mask = mask.astype(bool)
    tinted = np.where(mask[..., None], 0.5 * image + 0.5 * np.asarray(colour), 0.75 * image).astype(np.uint8)
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            inner &= np.roll(mask, shift, axis)
    tinted[mask & ~inner] = colour
    return tinted


def panel(
    image: np.ndarray, text: str, truth: np.ndarray, prediction: np.ndarray, side: int = 240
) -> np.ndarray:
    """Image, truth and prediction side by side under their sentence.

    Args: image uint8 [H, W, 3]; truth, prediction bool [H, W]; side: height of each picture, pixels.
    """
    pictures = (image, overlay(image, truth, _TRUTH), overlay(image, prediction, _PREDICTION))
    width = max(1, round(side * image.shape[1] / image.shape[0]))
    canvas = Image.new("RGB", (3 * width + 4 * _MARGIN, side + _CAPTION + _MARGIN), "white")
    for column, picture in enumerate(pictures):
        resized = Image.fromarray(picture).resize((width, side), Image.Resampling.NEAREST)
        canvas.paste(resized, (_MARGIN + column * (width + _MARGIN), _CAPTION))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    draw.text((_MARGIN, 0), text, fill="black", font=font)
    for column, (label, colour) in enumerate(
        (("image", "black"), ("truth", _TRUTH), ("prediction", _PREDICTION))
    ):
        small = ImageFont.load_default(size=11)
        draw.text((_MARGIN + column * (width + _MARGIN), 18), label, fill=colour, font=small)
    return np.asarray(canvas)


def sheet(panels: Sequence[np.ndarray], columns: int = 2) -> np.ndarray:
    """Panels uint8 [h, w, 3] in rows of `columns`, in order, on one uint8 image."""
    height, width = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    columns = min(columns, len(panels))
    canvas = np.full((-(-len(panels) // columns) * height, columns * width, 3), 255, np.uint8)
    for i, panel in enumerate(panels):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
    return canvas


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 image [H, W, 3] or mask [H, W]."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def curves(history: Sequence[dict], metric: str) -> bytes:
    """A PNG of loss and evaluation figure against the step.

    Args: history: rows of metrics.jsonl; metric: e.g. 'val/squash/oIoU'.
    """
    from matplotlib.figure import Figure  # Slow to import, and needed once per run.

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    terms = sorted({key for row in history for key in row if key.startswith("train/loss")})
    for key in terms:
        steps, values = _series(history, key)
        left.plot(steps, values, label=key.removeprefix("train/"), linewidth=2 if key == "train/loss" else 1)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="training loss")
    if terms:
        left.legend()
    split, _, figure_name = metric.partition("/")
    for key, label in ((metric, metric), (f"{split}/shuffled_text/{figure_name}", "sentences shuffled")):
        steps, values = _series(history, key)
        if steps:
            right.plot(steps, values, marker="o", label=label)
    right.set(xlabel="step", ylabel="%", title=metric)
    if right.lines:
        right.legend()
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _series(history: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    rows = [(row["step"], row[key]) for row in history if key in row]
    return [step for step, _ in rows], [value for _, value in rows]
