"""Captions as numbers: which words and pieces of words a text has, hashed.

A caption of a few words needs no grammar, so a network of ours sees it as a bag: every word, and every three
neighbouring letters of it (by which `crying` and `cries` are alike, and a word never seen is not nothing), each hashed
to one of a fixed number of rows of a trained table. There is no vocabulary to keep.

References:
    Bojanowski et al., Enriching Word Vectors with Subword Information, arXiv 1607.04606, section 3.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

__all__ = ["LENGTH", "tokens"]

LENGTH = 96  # most tokens of a caption that are read


def tokens(texts: Sequence[str], rows: int) -> Tensor:
    """The hashed words and letter triples of each text, int64 `(texts, LENGTH)`, from 1 to `rows`, then 0 as filling.

    Args:
        texts: any; an empty text is all filling.
        rows: of the table.
    """
    table = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(table, texts, strict=True):
        found: dict[str, None] = {}
        for word in re.findall(r"\w+", text.lower()):
            marked = f"<{word}>"
            found |= dict.fromkeys([marked, *(marked[k : k + 3] for k in range(len(marked) - 2))])
        ids = [1 + crc32(piece.encode()) % rows for piece in found][:LENGTH]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return table
