"""What a network will see: pictures, masks and sentences as they come out of the data pipeline."""

from __future__ import annotations

import itertools

import numpy as np
from ml_collections import ConfigDict

import input_pipeline
from input_pipeline import Augmentation, DataError, Loader, Tokenizer
from magnet_jax import visualize
from magnet_jax.train_step import masked_sentences
from magnet_jax.trained import with_vocabulary


def preview(config: ConfigDict, split: str, n: int) -> tuple[np.ndarray, int]:
    """A sheet uint8 [H, W, 3] of n examples, or of as many as there are, and their number.

    Of the split that is trained on, the first ones of the training, changed at random and with hidden words as they will
    be; of any other, ones from all over it. Raises DataError as the data do, and UserError as the configuration does.
    """
    tokenizer = Tokenizer(config.data.vocab, config.data.max_words)
    config = with_vocabulary(config, tokenizer)
    records = input_pipeline.load_split(config.data, split)
    train = split == config.data.split
    if not train:
        records = records.select(np.unique(np.linspace(0, len(records) - 1, n).astype(int)))
    loader = _loader(records, tokenizer, config, train, n)
    pictures: list[np.ndarray] = []
    for step, batch in enumerate(itertools.islice(loader, -(-n // loader.batch_size) if train else None)):
        ids = (
            np.asarray(masked_sentences(config.seed, step, batch, config.loss))
            if train
            else batch["text_ids"]
        )
        for k in np.flatnonzero(batch["valid"])[: n - len(pictures)]:
            lines = _lines(tokenizer, records.texts[int(batch["index"][k])], ids[k])
            pictures.append(visualize.captioned(batch["image"][k], batch["mask"][k], lines))
    if not pictures:
        raise DataError(
            f"split '{split}': none of {n} examples can be shown: {next(iter(loader.bad.values()))}"
        )
    return visualize.sheet(pictures, columns=4), len(pictures)


def _loader(records, tokenizer: Tokenizer, config: ConfigDict, train: bool, n: int) -> Loader:
    return Loader(
        records,
        tokenizer,
        # That of the training, since hidden words depend on it.
        batch_size=config.data.batch_size if train else min(n, config.eval.batch_size),
        image_size=(config.data.image_size, config.data.image_size),
        seed=config.seed,
        train=train,
        sentences=config.data.sentences,
        augmentation=Augmentation(**config.data.augment.to_dict()),
        max_bad_share=1.0,
        workers=config.data.workers,
        cache_bytes=0,  # A few of many.
        prefetch=0,
    )


def _lines(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> list[str]:
    """The sentence as it is written, and the pieces that the network reads of it."""
    return [text, " ".join(tokenizer.tokens(ids))]
