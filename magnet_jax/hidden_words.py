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
from tqdm import tqdm

import input_pipeline
from input_pipeline import Loader
from magnet_jax.errors import UserError
from magnet_jax.evaluate import other_pairs
from magnet_jax.trained import Trained, load_trained


def hidden_words(trained: Trained, split: str, seed: int = 0) -> dict[str, Any]:
    """Of every expression of a split one word is hidden, drawn at random; the share of them that is guessed.

    Percentages: `own` with the expression's picture and object, `other` with those of another picture. Where both are the
    same, words are guessed from the other words alone. `count` is of expressions. Raises UserError for a network without
    the head, and for a split without a word to hide.
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

    rng, right, count = np.random.default_rng(seed), {"own": 0, "other": 0}, 0
    for batch, shown in tqdm(zip(own, other, strict=True), "guessing", len(own), unit=" batches", delay=20):
        ids, words = np.array(batch["text_ids"]), batch["text_mask"]
        length = words.sum(1) - 2  # Without [CLS] and [SEP].
        places = 1 + (rng.random(size) * np.maximum(length, 1)).astype(int)
        truth = ids[np.arange(size), places]
        ids[np.arange(size), places] = tokenizer.mask_id
        counted = batch["valid"] & shown["valid"] & (length > 0)
        count += int(counted.sum())
        for name, seen in (("own", batch), ("other", shown)):
            question = {"image": seen["image"], "mask": seen["mask"], "text_ids": ids, "text_mask": words}
            found = np.asarray(guess(trained.variables, question, places)) == truth
            right[name] += int(found[counted].sum())
    if not count:
        raise UserError(f"split '{split}' has no sentence with a word to hide; give another --split")
    return {name: 100 * share / count for name, share in right.items()} | {"count": count}


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
