"""Conversations side by side in rows: best-fit, so that none is cut and few ids are padding."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np


class BestFit:
    """Rows of `capacity` ids that are filled one conversation at a time, each into the row it fills best.

    Attributes:
        rows: of each row the conversations in it, by the number that they were given.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[list[int]] = []
        self._rooms: list[int] = []  # that some row still has, ascending
        self._by_room: dict[int, list[int]] = defaultdict(list)

    def fits(self, length: int) -> bool:
        """Whether a row that is begun has room for so many ids."""
        return bool(self._rooms) and self._rooms[-1] >= length

    def add(self, number: int, length: int) -> None:
        """Into the row with the least room that is enough, or a new one."""
        at = bisect.bisect_left(self._rooms, length)
        if at < len(self._rooms):
            room = self._rooms[at]
            row = self._by_room[room].pop()
            if not self._by_room[room]:
                del self._rooms[at]
        else:
            room, row = self.capacity, len(self.rows)
            self.rows.append([])
        self.rows[row].append(number)
        left = room - length
        if left:
            if not self._by_room[left]:
                bisect.insort(self._rooms, left)
            self._by_room[left].append(row)


def pack(numbers: Iterable[int], lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of the conversations `numbers`, the longest placed first; `lengths[number]` is at most `capacity`."""
    packed = BestFit(capacity)
    for number in sorted(numbers, key=lambda n: (-int(lengths[n]), n)):
        packed.add(number, int(lengths[number]))
    return packed.rows
