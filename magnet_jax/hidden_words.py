"""Whether a network trained with Mask Grounding looks at the picture when it guesses a hidden word.

python -m magnet_jax.hidden_words --run=DIR [--split=val]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import input_pipeline
from input_pipeline import Loader
from magnet_jax.errors import UserError
from magnet_jax.evaluate import other_pairs
from magnet_jax.trained import Trained, load_trained

_BATCH = 64


def hidden_words(trained: Trained, split: str, seed: int = 0) -> dict[str, Any]:
    """Of every expression of a split one word is hidden, drawn at random; the share of them that is guessed.

    Percentages: `own` with the expression's picture and object, `other` with those of another picture. Where both are the
    same, words are guessed from the other words alone. `count` is of expressions. Raises UserError for a network without
    the head.
    """
    network, tokenizer, config = trained.network, trained.tokenizer, trained.config
    if network.grounding is None:
        raise UserError(
            "the network was trained without Mask Grounding and guesses no words; give a --run with it"
        )
    records = input_pipeline.load_split(config.data, split)
    side = config.data.image_size
    shown = np.zeros((len(records), side, side, 3), np.uint8)
    objects = np.zeros((len(records), side, side), bool)
    ids, words = (np.zeros((len(records), config.data.max_words), np.int32) for _ in range(2))
    for batch in Loader(records, tokenizer, batch_size=_BATCH, image_size=(side, side), seed=0, train=False):
        rows, valid = batch["index"], np.asarray(batch["valid"], bool)
        for column, name in ((shown, "image"), (objects, "mask"), (ids, "text_ids"), (words, "text_mask")):
            column[rows[valid]] = np.asarray(batch[name])[valid]
    usable = np.flatnonzero(words.sum(1) > 2)  # More than [CLS] and [SEP].
    partner = other_pairs(records.image_rows, seed)
    rng = np.random.default_rng(seed)
    places = 1 + (rng.random(len(records)) * (np.maximum(words.sum(1), 3) - 2)).astype(int)
    hidden = ids.copy()
    hidden[np.arange(len(ids)), places] = tokenizer.mask_id

    @jax.jit
    def guess(variables, batch, places):
        logits = network.word_logits(variables, network.apply(variables, batch), batch)
        return logits[jnp.arange(len(places)), places].argmax(-1)

    right = {"own": 0, "other": 0}
    for start in range(0, len(usable), _BATCH):
        # As many each time, for one program: the last is repeated, and its result left.
        rows = usable[np.minimum(np.arange(start, start + _BATCH), len(usable) - 1)]
        for name, seen in (("own", rows), ("other", partner[rows])):
            batch = {
                "image": shown[seen],
                "mask": objects[seen],
                "text_ids": hidden[rows],
                "text_mask": words[rows],
            }
            found = np.asarray(guess(trained.variables, batch, places[rows])) == ids[rows, places[rows]]
            right[name] += int(found[: len(usable) - start].sum())
    return {name: 100 * count / len(usable) for name, count in right.items()} | {"count": len(usable)}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 and one line on stderr where it cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m magnet_jax.hidden_words", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--run", required=True, help="directory of a run with Mask Grounding")
    parser.add_argument("--split", default="val", help="of the data that it was trained on")
    arguments = parser.parse_args(argv)
    try:
        found = hidden_words(load_trained(Path(arguments.run)), arguments.split)
    except (UserError, input_pipeline.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"hidden words of {found['count']} expressions guessed: {found['own']:.1f} % with their picture, "
        f"{found['other']:.1f} % with another"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
