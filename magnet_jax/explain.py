"""What a network makes of each word: where it looks for it, and what it would have said in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from input_pipeline import ops
from magnet_jax import visualize
from magnet_jax.evaluate import upsample
from magnet_jax.network import normalise
from magnet_jax.predict import Predictor, check_texts, png_output
from magnet_jax.trained import Trained, load_trained
from magnet_jax.workdir import write_atomically, write_json

_LIKELY = 3  # Words of a prediction that are shown.
_AT_ONCE = 4  # Sentences that are guessed at the same time.


@dataclasses.dataclass(frozen=True)
class Word:
    """One piece of a sentence, over a picture of H x W pixels; None where the network has no such part.

    `attention` is where it looks in the language side of the fusion, the mean of the four stages, each with a largest value
    of 1. `similarity` is the cosine with every pixel, in the space where the alignment loss compares them. `guesses` are the
    likeliest words in its place, with probabilities: it is hidden, and the mask that the whole sentence gives is shown.
    """

    text: str
    attention: np.ndarray | None  # [H, W]
    similarity: np.ndarray | None  # [H, W]
    guesses: tuple[tuple[str, float], ...] | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A sentence, its mask bool [H, W], and its words."""

    text: str
    mask: np.ndarray
    words: tuple[Word, ...]


class Explainer:
    """Shows how a network understands a sentence."""

    def __init__(self, trained: Trained):
        self.trained, self.predictor = trained, Predictor(trained)
        self._look, self._guess = jax.jit(self._maps), jax.jit(self._guesses)

    def explain(self, image: Any, text: str) -> Explanation:
        """Raises and warns as `Predictor.predict`, for the same kinds of image."""
        picture = ops.open_image(image, upright=True)
        size, side = (picture.height, picture.width), self.trained.config.data.image_size
        mask = self.predictor.predict(picture, [text])[0].mask
        tokenizer = self.trained.tokenizer
        ids, word_mask, _ = tokenizer.encode([text])
        pixels = ops.prepare_image(picture, (side, side))[None]
        variables = self.trained.variables
        attention, similarity = self._look(variables, pixels, ids, word_mask)
        shown = [
            i for i in range(int(word_mask.sum())) if ids[0, i] not in (tokenizer.cls_id, tokenizer.sep_id)
        ]
        guesses: list[tuple[tuple[str, float], ...] | None] = [None] * len(shown)
        if self.trained.network.grounding is not None:
            small = upsample(np.float32(mask), (side, side)) > 0.5
            guesses = []
            for start in range(0, len(shown), _AT_ONCE):
                # As many each time, for one program: the last is repeated, and its result left.
                places = np.array(shown)[np.minimum(np.arange(start, start + _AT_ONCE), len(shown) - 1)]
                hidden = np.repeat(ids, _AT_ONCE, 0)
                hidden[np.arange(_AT_ONCE), places] = tokenizer.mask_id
                found = np.asarray(self._guess(variables, pixels, hidden, word_mask, places, small[None]))
                guesses += map(self._likeliest, found[: len(shown) - start])
        words = tuple(
            Word(
                tokenizer.tokens([ids[0, place]])[0],
                _combined([np.asarray(stage[0, place]) for stage in attention], size),
                None if similarity is None else upsample(np.asarray(similarity[0, place]), size),
                guess,
            )
            for place, guess in zip(shown, guesses, strict=True)
        )
        return Explanation(text, mask, words)

    def _maps(self, variables, image, ids, word_mask):
        """Attention of every stage `[1, L, H, W]`, and similarity `[1, L, h, w]` or None."""
        network = self.trained.network
        of_model = {"params": variables["params"]["model"], "batch_stats": variables["batch_stats"]}
        output, seen = network.model.apply(
            of_model, normalise(image), ids, word_mask, mutable=["intermediates"]
        )
        stages = seen.get("intermediates", {})
        attention = []
        for number, features in enumerate(output.stage_features):
            if f"text_fusion_{number}" in stages:
                (weights,) = stages[f"text_fusion_{number}"]["pixels"]
                attention.append(weights.reshape(*weights.shape[:2], *features.shape[1:3]))
        params = variables["params"]
        projection = params["model"].get("lang_proj") or params.get("text_projection", {}).get("dense")
        if projection is None:
            return attention, None
        words = output.word_features @ projection["kernel"] + projection["bias"]
        words, pixels = (
            x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (words, output.mask_features)
        )
        return attention, jnp.einsum("blc,bhwc->blhw", words, pixels)

    def _guesses(self, variables, image, ids, word_mask, places, mask):
        """Probabilities `[R, V]` of words at the place that is hidden in each of R sentences."""
        network, rows = self.trained.network, jnp.arange(len(ids))
        word_mask, mask = (jnp.repeat(x, len(ids), 0) for x in (word_mask, mask))
        pairs = jnp.stack([jnp.zeros_like(rows), rows])
        batch = {"image": image, "text_ids": ids, "text_mask": word_mask, "mask": mask, "pairs": pairs}
        logits = network.word_logits(variables, network.apply(variables, batch), batch)
        return jax.nn.softmax(logits[rows, places])

    def _likeliest(self, probabilities: np.ndarray) -> tuple[tuple[str, float], ...]:
        tokenizer = self.trained.tokenizer
        known = np.sort([number for number in tokenizer.vocab.values() if number != tokenizer.pad_id])
        best = known[np.argsort(-probabilities[known], kind="stable")[:_LIKELY]]
        return tuple((tokenizer.tokens([i])[0], float(probabilities[i])) for i in best)


def _combined(stages: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray | None:
    if not stages:
        return None
    return np.mean([upsample(np.float32(stage / stage.max()), size) for stage in stages], 0)


def figure(image: np.ndarray, found: Explanation) -> bytes:
    """A PNG: the picture with its mask, and a column of maps for every word, with the guesses below."""
    from matplotlib.figure import Figure  # Slow to import.

    rows = [name for name in ("attention", "similarity") if getattr(found.words[0], name) is not None]
    height, width = max(len(rows), 1), len(found.words) + 1
    drawing = Figure(figsize=(1.9 * width, 2.3 * height + 0.6), layout="constrained")
    axes = np.atleast_2d(drawing.subplots(height, width, squeeze=False))
    for one in axes.ravel():
        one.set(xticks=[], yticks=[])
    drawing.suptitle(found.text)
    for row in range(height):
        axes[row, 0].imshow(visualize.overlay(image, found.mask))
        axes[row, 0].set_ylabel(rows[row] if rows else "")
    for column, word in enumerate(found.words, 1):
        axes[0, column].set_title(word.text)
        for row, name in enumerate(rows):
            low = {"attention": 0.0, "similarity": None}[name]
            axes[row, column].imshow(image.mean(-1), cmap="gray")
            axes[row, column].imshow(getattr(word, name), cmap="inferno", alpha=0.65, vmin=low)
        if word.guesses:
            lines = "\n".join(f"{guess} {probability:.2f}" for guess, probability in word.guesses)
            axes[-1, column].set_xlabel(lines, fontsize=8)
    buffer = BytesIO()
    drawing.savefig(buffer, dpi=110)
    return buffer.getvalue()


def explain(
    workdir: str, image: str, texts: Sequence[str], output: str, config: ConfigDict | None = None
) -> None:
    """Writes for every sentence a figure to `output`, and beside it the guesses as JSON; numbered for several."""
    check_texts(texts)
    path = png_output(output)
    picture = ops.open_image(image, upright=True)
    explainer = Explainer(load_trained(workdir, config))
    if explainer.trained.network.grounding is None:
        print("note: the network was trained without Mask Grounding and guesses no words", flush=True)
    if not explainer.trained.config.loss.alignment:
        print(
            "note: it was trained without the alignment loss, which makes pixels similar to words", flush=True
        )
    for number, text in enumerate(texts):
        found = explainer.explain(picture, text)
        name = path if len(texts) == 1 else path.with_suffix(f".{number}.png")
        write_atomically(name, figure(np.asarray(picture), found))
        words = [
            {"word": word.text, "guesses": [{"word": w, "probability": p} for w, p in word.guesses or ()]}
            for word in found.words
        ]
        write_json(name.with_suffix(".json"), {"text": text, "words": words})
        print(f"'{text}': {name} and {name.with_suffix('.json')}")
        for word in found.words:
            if word.guesses:
                print(f"  {word.text:<12} hidden: {', '.join(f'{w} {p:.2f}' for w, p in word.guesses)}")
