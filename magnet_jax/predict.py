"""Prediction: one image, any number of sentences, masks at the image's own size."""

import dataclasses
import sys
from collections.abc import Sequence
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
from magnet_jax.trained import Trained, load_trained

_COLOURS = ((230, 60, 40), (40, 110, 230), (40, 170, 70), (210, 140, 20), (150, 60, 200), (20, 170, 180))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a sentence refers to in an image of H x W pixels."""

    text: str
    mask: np.ndarray  # bool [H, W]
    logits: np.ndarray  # float32 [H, W]
    score: float  # Mean probability inside the mask; 0 where it is empty.


class Predictor:
    """Finds what sentences refer to.

    >>> Predictor.from_workdir("runs/shapes").predict("scene.png", ["the red ring"])[0].mask
    """

    def __init__(self, trained: Trained):
        self.trained = trained
        self._logits = jax.jit(lambda variables, batch: trained.network.apply(variables, batch).mask_logits)

    @classmethod
    def from_workdir(cls, workdir: str | Path, config: ConfigDict | None = None) -> "Predictor":
        """The network of a run directory; raises UserError where it holds none."""
        return cls(load_trained(workdir, config))

    def predict(
        self, image: str | Path | bytes | Image.Image, texts: Sequence[str], batch_size: int = 8
    ) -> list[Prediction]:
        """One prediction per sentence.

        Raises DataError for an image that cannot be read and for an empty sentence; warns on stderr about sentences
        that are cut and words that the vocabulary lacks.
        """
        image = ops.open_image(image)
        ids, words = self._encode(texts)
        side = self.trained.config.data.image_size
        pixels = ops.prepare_image(image, (side, side))
        batch_size = min(batch_size, len(texts))
        images = np.broadcast_to(pixels, (batch_size, *pixels.shape))
        predictions = []
        for start in range(0, len(texts), batch_size):
            rows = np.minimum(
                np.arange(start, start + batch_size), len(texts) - 1
            )  # The last batch repeats a row.
            batch = {"image": images, "text_ids": ids[rows], "text_mask": words[rows]}
            logits = np.asarray(self._logits(self.trained.variables, batch))
            for text, small in zip(texts[start : start + batch_size], logits, strict=False):
                predictions.append(_prediction(text, upsample(small, (image.height, image.width))))
        return predictions

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
    if not texts:
        raise UserError("--text is missing; give --text='the red circle on the left', repeatable")
    if not all(text.strip() for text in texts):
        raise UserError("--text is empty; write what to look for, as in --text='the red circle on the left'")
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise UserError(f"--output is '{output}'; expected a name that ends in .png")
    picture = np.asarray(ops.open_image(image))  # Before the network is loaded: a wrong name shows at once.
    predictions = Predictor.from_workdir(workdir, config).predict(image, texts)
    for number, prediction in enumerate(predictions):
        name = output if len(predictions) == 1 else output.with_suffix(f".{number}.png")
        colour = _COLOURS[number % len(_COLOURS)]
        run_files.write_atomically(
            name, visualize.encode_png(visualize.overlay(picture, prediction.mask, colour))
        )
        mask_name = name.with_suffix(".mask.png")
        run_files.write_atomically(mask_name, visualize.encode_png(prediction.mask.astype(np.uint8) * 255))
        share = 100 * prediction.mask.mean()
        print(
            f"'{prediction.text}': {share:.1f} % of the image, score {prediction.score:.2f}, {name} and {mask_name}"
        )


def _prediction(text: str, logits: np.ndarray) -> Prediction:
    mask = logits > 0
    probability = 1 / (1 + np.exp(-logits[mask]))
    return Prediction(text, mask, logits, float(probability.mean()) if mask.any() else 0.0)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
