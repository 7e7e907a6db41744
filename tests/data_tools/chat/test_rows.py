"""Which conversations make rows: what is cut, what is left out, and what counts as held out already."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.chat.rows import ChatOptions, Conversations, chosen_rows, gathered

PLACEHOLDER = 1


class Part(NamedTuple):
    ids: np.ndarray
    counted: np.ndarray
    lengths: np.ndarray


def gather(*conversations: list[int], images: list[list[int]] | None = None) -> Conversations:
    """In rows of four ids, all of which count."""
    ids = np.array([token for one in conversations for token in one], "<u2")
    part = Part(ids, np.ones(len(ids), bool), np.array([len(one) for one in conversations]))
    numbers = None if images is None else [np.array(one, "<i4") for one in images]
    return gathered([part], ChatOptions(4, "truncate", 0), numbers, PLACEHOLDER if images is not None else None)


def test_none_is_cut_where_an_image_would_be_lost() -> None:
    long = ([PLACEHOLDER, 6, 7, 8, 9], [5, 6, 7, PLACEHOLDER, 8], [5, 6, 7, 8, PLACEHOLDER])
    seen = gather(*long, images=[[0], [1], [2]])
    assert (seen.lengths.tolist(), seen.truncated, seen.dropped) == ([4, 0, 0], 1, 2)
    text = gather(*long)
    assert (text.lengths.tolist(), text.truncated, text.dropped) == ([4, 4, 4], 3, 0)


def test_the_same_words_about_another_image_are_no_twin() -> None:
    """One of each pair is held out."""
    options = ChatOptions(4, "truncate", 1, seed=3)
    words = [PLACEHOLDER, 6, 7, 8]
    other = chosen_rows(gather(words, words, images=[[0], [1]]), options, Path("in"))
    assert (len(other.training), other.twins) == (1, 0)
    same = chosen_rows(gather(words, words, [9, 9, 9, 9], images=[[0], [0], []]), options, Path("in"))
    assert same.held_out != [[2]], "the seed holds out one of the twins"
    assert (same.training, same.twins) == ([[2]], 1)
