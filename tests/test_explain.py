"""What is shown of words: against the network itself, run the long way."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from magnet_jax import explain as module
from magnet_jax.errors import UserError
from magnet_jax.explain import Explainer, explain, figure
from tests.test_predict import pictures, trained

TEXT = "the red ring on the left"


@functools.cache
def explainer():
    """One for all tests, which compiles once."""
    return Explainer(trained())


@jax.jit
def run_network(variables, batch):
    """The network as it is, a row for each sentence."""
    return trained().network.apply(variables, batch)


@pytest.fixture(scope="module")
def found():
    return explainer().explain(pictures(1)[0], TEXT)


def test_words_and_their_maps(found):
    picture = pictures(1)[0]
    assert [word.text for word in found.words] == TEXT.split()
    for word in found.words:
        assert word.attention.shape == word.similarity.shape == found.mask.shape == picture.size[::-1]
        assert word.attention.min() >= 0
        assert 0 < word.attention.max() <= 1 + 1e-6
        assert np.abs(word.similarity).max() <= 1 + 1e-5


def test_guesses_are_those_of_the_head_with_one_word_hidden(found):
    """One row at a time, without anything shared."""
    t = trained()
    network, variables, tokenizer = t.network, t.variables, t.tokenizer
    ids, word_mask, _ = tokenizer.encode([TEXT])
    side = t.config.data.image_size
    pixels = np.asarray(pictures(1)[0].resize((side, side), Image.Resampling.BILINEAR))[None]
    small = module.upsample(np.float32(found.mask), (side, side)) > 0.5
    for place, word in enumerate(found.words, 1):  # [CLS] comes first.
        hidden = ids.copy()
        hidden[0, place] = tokenizer.mask_id
        output = run_network(variables, {"image": pixels, "text_ids": hidden, "text_mask": word_mask})
        logits = network.grounding.apply(
            {"params": variables["params"]["grounding"]},
            *(output.word_features, word_mask, output.stage_features[network.grounding_stage - 1]),
            *(np.float32(small[None]), output.word_embedding),
        )[0, place]
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        for text, probability in word.guesses:
            np.testing.assert_allclose(probabilities[tokenizer.vocab[text]], probability, atol=1e-5)
        assert word.guesses[0][1] == pytest.approx(
            float(np.delete(probabilities, tokenizer.pad_id).max()), abs=1e-5
        )
        assert [p for _, p in word.guesses] == sorted((p for _, p in word.guesses), reverse=True)


def test_attention_adds_up_to_one_and_similarity_is_the_sentence_s():
    """Pixels of a word share a weight of one; the mean word's similarity is that of the text embedding."""
    t = trained()
    ids, word_mask, _ = t.tokenizer.encode(["ring"])
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    attention, similarity = explainer()._look(t.variables, pixels, ids, word_mask)
    assert len(attention) == 4
    for stage in attention:
        np.testing.assert_allclose(np.asarray(stage).sum((2, 3)), 1, atol=1e-4)
    params = t.variables["params"]["model"]
    output = run_network(t.variables, {"image": pixels, "text_ids": ids, "text_mask": word_mask})
    projection = params["lang_proj"]
    word = np.asarray(output.word_features)[0, 1] @ projection["kernel"] + projection["bias"]
    pixel = np.asarray(output.mask_features)[0, 2, 3]
    cosine = word @ pixel / np.linalg.norm(word) / np.linalg.norm(pixel)
    np.testing.assert_allclose(similarity[0, 1, 2, 3], cosine, atol=1e-4)


def test_a_network_without_these_parts():
    found = Explainer(trained("lavt")).explain(pictures(1)[0], "red ring")
    assert [word.attention for word in found.words] == [None, None]
    assert figure(np.asarray(pictures(1)[0]), found).startswith(b"\x89PNG")


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "load_trained", lambda *_: trained())
    monkeypatch.setattr(module, "Explainer", lambda _: explainer())
    image = tmp_path / "a.png"
    pictures(1)[0].save(image)
    out = tmp_path / "words.png"
    explain("run", str(image), [TEXT, "blue star"], str(out))
    said = capsys.readouterr().out
    for number, text in enumerate((TEXT, "blue star")):
        Image.open(tmp_path / f"words.{number}.png").verify()
        written = json.loads((tmp_path / f"words.{number}.json").read_text())
        assert written["text"] == text
        assert [word["word"] for word in written["words"]] == text.split()
        assert all(len(word["guesses"]) == 3 for word in written["words"])
    assert f"'{TEXT}'" in said
    assert "hidden:" in said
    for texts, output, message in (([], "a.png", "--text is missing"), (["x"], "a.jpg", "ends in .png")):
        with pytest.raises(UserError, match=message):
            explain("run", str(image), texts, output)
