"""Pictures: overlays, panels (image, truth, prediction) and the curves of a run."""

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CAPTION, _MARGIN = 34, 4  # Heights in pixels.
_TRUTH, _PREDICTION = (40, 180, 70), (230, 60, 40)


def overlay(
    image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = _PREDICTION, tint: float = 0.5
) -> np.ndarray:
    """An image uint8 [H, W, 3] with the mask bool [H, W] tinted that much and outlined."""
    mask = mask.astype(bool)
    inside = (1 - tint) * image + tint * np.asarray(colour)
    tinted = np.where(mask[..., None], inside, 0.75 * image).astype(np.uint8)
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            inner &= np.roll(mask, shift, axis)
    tinted[mask & ~inner] = colour
    return tinted


def panel(
    image: np.ndarray, text: str, truth: np.ndarray, predictions: Mapping[str, np.ndarray], side: int = 240
) -> np.ndarray:
    """Image, truth and predictions side by side under their sentence.

    Args: image uint8 [H, W, 3]; truth, predictions (by their captions) bool [H, W]; side: height of each picture, pixels.
    """
    columns = [("image", "black", image), ("truth", _TRUTH, overlay(image, truth, _TRUTH))]
    columns += [(name, _PREDICTION, overlay(image, mask, _PREDICTION)) for name, mask in predictions.items()]
    width = max(1, round(side * image.shape[1] / image.shape[0]))
    step = width + _MARGIN
    canvas = Image.new("RGB", (len(columns) * step + _MARGIN, side + _CAPTION + _MARGIN), "white")
    draw, small = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    draw.text((_MARGIN, 0), text, fill="black", font=ImageFont.load_default(size=14))
    for number, (label, colour, picture) in enumerate(columns):
        resized = Image.fromarray(picture).resize((width, side), Image.Resampling.NEAREST)
        canvas.paste(resized, (_MARGIN + number * step, _CAPTION))
        draw.text((_MARGIN + number * step, 18), label, fill=colour, font=small)
    return np.asarray(canvas)


def captioned(image: np.ndarray, mask: np.ndarray, lines: Sequence[str], side: int = 240) -> np.ndarray:
    """An image uint8 [H, W, 3] with its mask [H, W] drawn over it, under lines of text broken to its width."""
    font = ImageFont.load_default(size=12)
    width = max(1, round(side * image.shape[1] / image.shape[0]))
    broken = [part for line in lines for part in _break(line, font, width) or [""]]
    top = 16 * len(broken) + _MARGIN
    canvas = Image.new("RGB", (width + _MARGIN, side + top + _MARGIN), "white")
    drawn = Image.fromarray(
        overlay(image, mask, _TRUTH, tint=0.0)
    )  # Words name colours, which have to be seen.
    picture = drawn.resize((width, side), Image.Resampling.NEAREST)
    canvas.paste(picture, (0, top))
    for number, line in enumerate(broken):
        ImageDraw.Draw(canvas).text((0, 16 * number), line, fill="black", font=font)
    return np.asarray(canvas)


def _break(line: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A line as several that are not wider than `width` pixels, unless a word is."""
    lines: list[str] = []
    for word in line.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


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


def curves(history: Sequence[dict], split: str, metric: str) -> bytes:
    """A PNG of loss and evaluation figure against the step.

    Args: history: rows of metrics.jsonl; split: e.g. 'val'; metric: e.g. 'squash/oIoU'.
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
    name = f"{split}/{metric}"
    for key, label in ((name, name), (f"{split}/shuffled_text/{metric}", "sentences shuffled")):
        steps, values = _series(history, key)
        if steps:
            right.plot(steps, values, marker="o", label=label)
    right.set(xlabel="step", ylabel="%", title=name)
    if right.lines:
        right.legend()
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _series(history: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    rows = [(row["step"], row[key]) for row in history if key in row]
    return [step for step, _ in rows], [value for _, value in rows]
