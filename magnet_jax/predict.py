"""Prediction: one image, any number of sentences, masks at the image's own size."""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import ops
from magnet_jax import visualize
from magnet_jax import workdir as run_files
from magnet_jax.errors import UserError
from magnet_jax.evaluate import upsample
from magnet_jax.models import Output
from magnet_jax.trained import Trained, load_trained

_COLOURS = ((230, 60, 40), (40, 110, 230), (40, 170, 70), (210, 140, 20), (150, 60, 200), (20, 170, 180))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a sentence refers to in an image of H x W pixels.

    `present` is the probability that it refers to anything there; None of a network that was trained without sentences that
    do not, and so always finds something. Below a half the mask is empty.
    """

    text: str
    mask: np.ndarray  # bool [H, W]
    logits: np.ndarray  # float32 [H, W]
    score: float  # Mean probability inside the mask; 0 where it is empty.
    present: float | None = None


class Predictor:
    """Finds what sentences refer to.

    >>> Predictor.from_pretrained("runs/shapes").predict("scene.png", ["the red ring"])[0].mask
    """

    def __init__(self, trained: Trained):
        self.trained = trained
        network = trained.network.with_closed_gates(trained.variables)
        self._output = jax.jit(
            lambda variables, batch: _of_answers(network.apply(variables, batch), trained.knows_absence)
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: ConfigDict | None = None) -> "Predictor":
        """The network of a run directory, or of a folder that `--format=portable` wrote; raises UserError for another."""
        return cls(load_trained(folder, config))

    def predict(
        self, image: str | Path | bytes | Image.Image, texts: Sequence[str], batch_size: int = 8
    ) -> list[Prediction]:
        """One prediction per sentence, `batch_size` of them at a time.

        A file is turned as its EXIF orientation says, and so is the mask.
        Raises DataError for an image that cannot be read and for an empty sentence; warns on stderr about sentences
        that are cut and words that the vocabulary lacks.
        """
        return next(self.predict_all([image], texts, min(batch_size, max(1, len(texts)))))

    def predict_all(
        self, images: Iterable[str | Path | bytes | Image.Image], texts: Sequence[str], batch_size: int = 8
    ) -> Iterator[list[Prediction]]:
        """What every sentence refers to in every image: of each image in turn, one prediction per sentence.

        `batch_size` pairs at a time, of several images where the sentences are few. What depends on the image alone is
        computed once for it, and what depends on the sentence alone once for a batch. Raises and warns as `predict`, and
        ValueError where there is no sentence, or one that is in no list.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is '{texts}'; give a list of sentences, even of one")
        if not texts:
            raise ValueError("texts is empty; give at least one sentence")
        ids, words = self._encode(texts)
        together = max(1, batch_size // len(texts))  # Images.
        images = iter(images)
        while opened := [ops.open_image(image, upright=True) for image in itertools.islice(images, together)]:
            yield from self._predict(opened, texts, ids, words, batch_size, together)

    def _predict(self, images, texts, ids, words, batch_size: int, together: int) -> list[list[Prediction]]:
        side = self.trained.config.data.image_size
        pixels = [ops.prepare_image(image, (side, side)) for image in images]
        # Sizes that stay the same from batch to batch, for one program: what is missing is repeated, and its result left.
        pixels = np.stack(pixels + pixels[-1:] * (together - len(pixels)))
        at_once = min(batch_size, len(texts))
        found: list[list[Prediction]] = [[] for _ in images]
        for start in range(0, len(texts), at_once):
            rows = np.minimum(np.arange(start, start + at_once), len(texts) - 1)
            pairs = np.indices((together, at_once)).reshape(2, -1)
            batch = {"image": pixels, "text_ids": ids[rows], "text_mask": words[rows], "pairs": pairs}
            answers = self._answers(batch)
            for (number, column), answer in zip(pairs.T, answers, strict=True):
                if number < len(images) and start + column < len(texts):
                    found[number].append(_prediction(images[number], texts[start + column], *answer))
        return found

    def predict_pairs(
        self, pairs: Iterable[tuple[Image.Image, str]], batch_size: int = 8
    ) -> Iterator[Prediction]:
        """What each sentence refers to in its image, `batch_size` pairs at a time; for many of both.

        Raises and warns as `predict`.
        """
        pairs, side = iter(pairs), self.trained.config.data.image_size
        while some := list(itertools.islice(pairs, batch_size)):
            images, texts = zip(*some, strict=True)
            ids, words = self._encode(texts)
            # Always as many, for one program: what is missing is repeated, and its result left.
            rows = np.minimum(np.arange(batch_size), len(some) - 1)
            pixels = np.stack([ops.prepare_image(image, (side, side)) for image in images])
            batch = {"image": pixels[rows], "text_ids": ids[rows], "text_mask": words[rows]}
            answers = itertools.islice(self._answers(batch), len(some))
            for image, text, answer in zip(images, texts, answers, strict=True):
                yield _prediction(image, text, *answer)

    def _answers(self, batch: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, float | None]]:
        """Of each pair the logits `[h, w]`, and the probability that there is something."""
        logits, present = jax.device_get(self._output(self.trained.variables, batch))
        return zip(logits, [None] * len(logits) if present is None else present.tolist(), strict=True)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokenizer = self.trained.tokenizer
        ids, words, cut = tokenizer.encode(texts)
        for text, was_cut in zip(texts, cut, strict=True):
            if was_cut:
                _warn(f"'{text}' is longer than {ids.shape[1]} tokens; the rest is ignored")
            if unknown := tokenizer.unknown_words(text):
                _warn(f"'{text}' has words that the vocabulary lacks: {', '.join(unknown)}")
        return ids, words


def predict(
    workdir: str, image: str, texts: Sequence[str], output: str, config: ConfigDict | None = None
) -> None:
    """Writes the overlay to `output` and the mask (0/255, the image's size) to `*.mask.png`; numbered for several texts."""
    check_texts(texts)
    output = png_output(output)
    opened = ops.open_image(image, upright=True)  # Before the network is loaded: a wrong name shows at once.
    picture = np.asarray(opened)
    predictions = Predictor.from_pretrained(workdir, config).predict(opened, texts)
    for number, prediction in enumerate(predictions):
        name = output if len(predictions) == 1 else output.with_suffix(f".{number}.png")
        colour = _COLOURS[number % len(_COLOURS)]
        run_files.write_atomically(
            name, visualize.encode_png(visualize.overlay(picture, prediction.mask, colour))
        )
        mask_name = name.with_suffix(".mask.png")
        run_files.write_atomically(mask_name, visualize.encode_png(prediction.mask.astype(np.uint8) * 255))
        print(f"'{prediction.text}': {in_words(prediction)}, {name} and {mask_name}")


def in_words(prediction: Prediction) -> str:
    """What was found, as a line says it."""
    if prediction.present is not None and prediction.present < 0.5:
        return f"no such object (probability of one {prediction.present:.2f})"
    if not prediction.mask.any():
        return "nothing found"
    return f"{100 * prediction.mask.mean():.1f} % of the image, score {prediction.score:.2f}"


def check_texts(texts: Sequence[str]) -> None:
    """Raises UserError where there is no sentence, or an empty one."""
    if not texts:
        raise UserError("--text is missing; give --text='the red circle on the left', repeatable")
    if not all(text.strip() for text in texts):
        raise UserError("--text is empty; write what to look for, as in --text='the red circle on the left'")


def png_output(output: str) -> Path:
    """The path to write to; raises UserError where it is not a PNG's."""
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise UserError(f"--output is '{output}'; expected a name that ends in .png")
    return path


def _of_answers(output: Output, knows_absence: bool) -> tuple[jax.Array, jax.Array | None]:
    known = knows_absence and output.class_logits is not None
    return output.mask_logits, jax.nn.softmax(output.class_logits)[:, 1] if known else None


def _prediction(image: Image.Image, text: str, small: np.ndarray, present: float | None) -> Prediction:
    logits = upsample(small, (image.height, image.width))
    mask = (logits > 0) & (present is None or present >= 0.5)
    probability = 1 / (1 + np.exp(-logits[mask]))
    return Prediction(text, mask, logits, float(probability.mean()) if mask.any() else 0.0, present)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
