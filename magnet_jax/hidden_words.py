"""Whether a network trained with Mask Grounding looks at the picture when it guesses a hidden word.

python -m magnet_jax.hidden_words --run=DIR [--split=val] [--words=20]
"""

from __future__ import annotations

import argparse
import collections
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import input_pipeline
from input_pipeline import Loader
from magnet_jax.errors import UserError
from magnet_jax.evaluate import other_pairs
from magnet_jax.trained import Trained, load_trained


def hidden_words(trained: Trained, split: str, seed: int = 0) -> dict[str, Any]:
    """Of every expression of a split one word is hidden, drawn at random; the share of them that is guessed.

    Percentages: `own` with the expression's picture and object, `other` with those of another picture. Where both are the
    same, words are guessed from the other words alone. `count` is of expressions. `words` has the same three by the word
    that is hidden, the most frequent first. Raises UserError for a network without the head, and for a split without a
    word to hide.
    """
    network, tokenizer, config = trained.network, trained.tokenizer, trained.config
    if network.grounding is None:
        raise UserError(
            "the network was trained without Mask Grounding and guesses no words; give a --run with it"
        )
    records = input_pipeline.load_split(config.data, split)
    others = records.select(other_pairs(records.image_rows, seed))
    size, side = config.eval.batch_size, config.data.image_size
    # Two loaders in step, so that no more than a batch is ever in memory.
    own, other = (
        Loader(
            some,
            tokenizer,
            batch_size=size,
            image_size=(side, side),
            seed=seed,
            train=False,
            max_bad_share=config.data.max_bad_share,
        )
        for some in (records, others)
    )

    @jax.jit
    def guess(variables, batch, places):
        logits = network.word_logits(variables, network.apply(variables, batch), batch)
        return logits[jnp.arange(size), places].argmax(-1)

    rng, hidden, right = np.random.default_rng(seed), [], {"own": [], "other": []}
    for batch, shown in tqdm(zip(own, other, strict=True), "guessing", len(own), unit=" batches", delay=20):
        ids, words = np.array(batch["text_ids"]), batch["text_mask"]
        length = words.sum(1) - 2  # Without [CLS] and [SEP].
        places = 1 + (rng.random(size) * np.maximum(length, 1)).astype(int)
        truth = ids[np.arange(size), places]
        ids[np.arange(size), places] = tokenizer.mask_id
        counted = batch["valid"] & shown["valid"] & (length > 0)
        hidden += truth[counted].tolist()
        for name, seen in (("own", batch), ("other", shown)):
            question = {"image": seen["image"], "mask": seen["mask"], "text_ids": ids, "text_mask": words}
            found = np.asarray(guess(trained.variables, question, places)) == truth
            right[name] += found[counted].tolist()
    if not hidden:
        raise UserError(f"split '{split}' has no sentence with a word to hide; give another --split")
    words = {}
    for word, count in collections.Counter(hidden).most_common():
        here = np.array(hidden) == word
        words[tokenizer.tokens([word])[0]] = _shares(right, here) | {"count": count}
    return _shares(right, np.ones(len(hidden), bool)) | {"count": len(hidden), "words": words}


def _shares(right: dict[str, list[bool]], where: np.ndarray) -> dict[str, float]:
    return {name: 100 * float(np.array(found)[where].mean()) for name, found in right.items()}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 and one line on stderr where it cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m magnet_jax.hidden_words", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--run", required=True, help="directory of a run with Mask Grounding")
    parser.add_argument("--split", default="val", help="of the data that it was trained on")
    parser.add_argument("--words", type=int, default=0, help="also of so many words, the most frequent ones")
    arguments = parser.parse_args(argv)
    try:
        if arguments.words < 0:
            raise UserError(f"--words is {arguments.words}; expected 0 or more")
        found = hidden_words(load_trained(Path(arguments.run)), arguments.split)
    except (UserError, input_pipeline.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"hidden words of {found['count']} expressions guessed: {found['own']:.1f} % with their picture, "
        f"{found['other']:.1f} % with another"
    )
    shown = list(found["words"].items())[: arguments.words]
    width = max((len(word) for word, _ in shown), default=0)
    for word, figures in shown:
        print(
            f"  {word:{width}}  {figures['count']:5d} times  {figures['own']:5.1f} % with their picture  "
            f"{figures['other']:5.1f} % with another"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
