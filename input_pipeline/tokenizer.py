"""Sentences to numbers: BERT's uncased WordPiece, from files or the built-in grammar, never from a hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from input_pipeline import shapes_grammar
from input_pipeline.records import DataError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHAPES = "shapes"
VOCAB_FILE = "vocab.txt"
_AT_ONCE = 4096  # Sentences; what the backend returns of one takes kilobytes.


class Tokenizer:
    """WordPiece with BERT's uncased normalisation.

    Args:
        vocab: 'shapes' (the words of the built-in grammar), the path of a vocab.txt (one piece per line), or
            a directory that holds a vocab.txt or a tokenizer.json.
        max_length: L; a sentence is [CLS] pieces [SEP], cut there (the published systems' cut drops the
            [SEP]) and padded.
    Raises:
        DataError: if the vocabulary is missing or is not a BERT vocabulary.
    """

    def __init__(self, vocab: str, max_length: int = 20):
        if max_length < 3:
            raise DataError(f"tokenizer: max_length {max_length} has no room for a word; take 3 or more")
        self.max_length = max_length
        self.vocab = _load_vocab(os.fspath(vocab))
        missing = [token for token in SPECIAL if token not in self.vocab]
        if missing or len(self.vocab) <= len(SPECIAL):
            lack = f"lacks {', '.join(missing)}" if missing else "has no words"
            raise DataError(
                f"{vocab}: a vocabulary of {len(self.vocab)} pieces that {lack}; a BERT vocab.txt is needed"
            )
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            self.vocab[token] for token in SPECIAL
        )
        self._pieces = {number: piece for piece, number in self.vocab.items()}
        # The tokenizers library and not transformers.BertTokenizerFast, whose constructor has taken the
        # vocabulary under different names and, given the wrong one, silently works with five words.
        self._backend = _backend(models.WordPiece(self.vocab, unk_token="[UNK]"))

    @property
    def vocab_size(self) -> int:
        """Number of rows that a word embedding needs."""
        return max(self._pieces) + 1

    def encode(
        self, texts: Sequence[str], allow_empty: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sentences to numbers.

        Returns:
            ids int32 [n, L]; mask int32 [n, L], 1 at real pieces; truncated bool [n], whether something was
            cut off.
        Raises:
            DataError: for a sentence without any word, unless those are allowed: then they are [CLS] [SEP].
        """
        ids = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        lengths = np.zeros(len(texts), np.int64)
        rows: dict[str, list[int]] = {}  # a data set says many sentences more than once
        for row, text in enumerate(texts):
            rows.setdefault(text, []).append(row)
        different = list(rows)
        for start in range(0, len(different), _AT_ONCE):
            some = different[start : start + _AT_ONCE]
            for text, encoding in zip(some, self._backend.encode_batch(list(map(_whole, some))), strict=True):
                if not encoding.ids and not allow_empty:
                    raise DataError(f"the sentence {text!r} has no words; write what to look for")
                numbers = [self.cls_id, *encoding.ids, self.sep_id]
                ids[rows[text], : len(numbers)] = numbers[: self.max_length]
                lengths[rows[text]] = len(numbers)
        mask = (np.arange(self.max_length) < lengths[:, None]).astype(np.int32)
        return ids, mask, lengths > self.max_length

    def unknown_words(self, text: str) -> list[str]:
        """The words of a sentence that the vocabulary cannot express, in their order."""
        text = _whole(text)
        encoding = self._backend.encode(text)
        return [
            text[a:b]
            for number, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
            if number == self.unk_id
        ]

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The pieces of one row of ids, special ones included, padding left out."""
        return [self._pieces[int(i)] for i in ids if int(i) != self.pad_id]

    def save(self, directory: str) -> None:
        """Writes vocab.txt, from which `Tokenizer(directory)` makes the same tokenizer."""
        os.makedirs(directory, exist_ok=True)
        lines = [self._pieces.get(i, f"[unused-{i}]") for i in range(self.vocab_size)]
        with open(os.path.join(directory, VOCAB_FILE), "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def learn_vocabulary(texts: Iterable[str], size: int) -> list[str]:
    """A vocabulary of at most `size` pieces for these sentences, of which none has an unknown word; special ones first.

    Raises DataError where there is no word at all, and where the letters alone are more than `size`.
    """
    backend = _backend(models.WordPiece(unk_token="[UNK]"))
    backend.train_from_iterator(
        map(_whole, texts),
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False),
    )
    found = backend.get_vocab()
    if len(found) <= len(SPECIAL):
        raise DataError("the sentences have no words to make a vocabulary of")
    if len(found) > size:
        raise DataError(
            f"a vocabulary of {size} pieces is too small: letters alone are {len(found)}; allow more"
        )
    return sorted(found, key=found.__getitem__)


def _backend(model: models.WordPiece) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _whole(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON and Python may hold and Unicode has not, joined or replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _load_vocab(vocab: str) -> dict[str, int]:
    if vocab == SHAPES:
        return {word: i for i, word in enumerate((*SPECIAL, *shapes_grammar.vocabulary()))}
    path = vocab
    if os.path.isdir(vocab):
        path = os.path.join(vocab, VOCAB_FILE)
        full = os.path.join(vocab, "tokenizer.json")
        if not os.path.exists(path) and os.path.exists(full):
            try:
                return tokenizers.Tokenizer.from_file(full).get_vocab(with_added_tokens=True)
            except Exception as error:  # the library raises plain Exception
                raise DataError(f"{full}: not a tokenizer file ({error})") from error
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such vocabulary; give 'shapes', a vocab.txt or a directory with one "
            "(`python -m input_pipeline vocabulary` makes one of your own sentences)"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not a text file in UTF-8 ({error.reason}); a BERT vocab.txt is needed"
        ) from error
    if lines and not lines[-1]:
        lines.pop()
    return {line.rstrip("\r"): i for i, line in enumerate(lines)}
