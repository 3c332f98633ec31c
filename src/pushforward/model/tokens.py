"""Captions as numbers: hashes of a text's words and of pieces of words.

A caption of a few words needs no grammar, so the package's networks see it as a bag: every word, and every three
neighbouring letters of it (by which `crying` and `cries` are alike, and a word never seen still means something), each
hashed to one of a fixed number of rows of a trained table. No vocabulary is stored.

References:
    Bojanowski et al., Enriching Word Vectors with Subword Information, arXiv 1607.04606, section 3.2.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

__all__ = ["LENGTH", "tokens", "warn_of_lost_words"]

LENGTH = 96  # a caption is read up to this many tokens


def tokens(texts: Sequence[str], rows: int) -> Tensor:
    """Hash the words and letter triples of each text, int64 `(texts, LENGTH)`, from 1 to `rows`, then 0 as filling.

    Args:
        texts: the texts; an empty text is all filling, and tokens beyond `LENGTH` are cut.
        rows: rows of the table.
    """
    table = torch.zeros(len(texts), LENGTH, dtype=torch.long, device="cpu")
    for row, text in zip(table, texts, strict=True):
        ids = [1 + crc32(piece.encode()) % rows for piece in _pieces(text)][:LENGTH]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long, device="cpu")
    return table


def warn_of_lost_words(text: str) -> None:
    """Warn of the words of a prompt that `tokens` cuts, wholly or in part."""
    places = {piece: place for place, piece in enumerate(_pieces(text))}
    lost = [word for word in _words(text) if any(places[piece] >= LENGTH for piece in _pieces(word))]
    if lost:
        start, words = text if len(text) < 40 else f"{text[:36]} ...", " ".join(dict.fromkeys(lost))
        warnings.warn(f"The model reads {LENGTH} tokens of the prompt {start!r}, but not: {words}", stacklevel=3)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _pieces(text: str) -> dict[str, None]:
    """List a text's words and their triples of letters, each once, in the order of the text."""
    found: dict[str, None] = {}
    for word in _words(text):
        marked = f"<{word}>"
        found |= dict.fromkeys([marked, *(marked[k : k + 3] for k in range(len(marked) - 2))])
    return found
