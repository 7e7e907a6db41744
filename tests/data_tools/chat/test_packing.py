"""Which row a conversation goes into, against best-fit decreasing written out plainly here."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data_tools.chat.packing import pack


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Ids in each row, longest conversation first, each into the fullest row that still has room."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        open_rows = [row for row, ids in enumerate(filled) if ids + length <= capacity]
        if open_rows:
            filled[max(open_rows, key=lambda row: filled[row])] += length
        else:
            filled.append(length)
    return sorted(filled)


@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_each_conversation_goes_into_the_row_that_it_fills_best(lengths: list[int]) -> None:
    rows = pack(range(len(lengths)), lengths, 30)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[number] for number in row) for row in rows) == plain_best_fit(lengths, 30)


def test_the_fullest_row_with_room_is_taken() -> None:
    assert pack(range(3), [6, 8, 2], 10) == [[1, 2], [0]]
