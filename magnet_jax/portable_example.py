"""python load.py PICTURE "the red ring": writes mask.png. Needs jax, orbax-checkpoint, tokenizers and pillow alone."""

import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
from tokenizers import BertWordPieceTokenizer

here = Path(__file__).resolve().parent
network = jax.export.deserialize(bytearray((here / "network.stablehlo").read_bytes()))
variables = {"batch_stats": {}} | ocp.StandardCheckpointer().restore(here / "params")
side, length = network.in_avals[-3].shape[1], network.in_avals[-1].shape[1]

picture, text = Image.open(sys.argv[1]).convert("RGB"), sys.argv[2]
words = BertWordPieceTokenizer(str(here / "tokenizer" / "vocab.txt")).encode(text).ids[:length]
ids, mask = np.zeros((2, 1, length), np.int32)
ids[0, : len(words)], mask[0, : len(words)] = words, 1
pixels = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))[None]
logits = np.asarray(network.call(variables, pixels, ids, mask)["mask_logits"])[0]


def stretch(rows, size):
    """Linear interpolation from the first row to the last."""
    at = np.linspace(0, len(rows) - 1, size)
    low = np.minimum(at.astype(int), len(rows) - 2)
    return rows[low] + (at - low)[:, None] * (rows[low + 1] - rows[low])


found = stretch(stretch(logits, picture.height).T, picture.width).T > 0
Image.fromarray(found).save("mask.png")
