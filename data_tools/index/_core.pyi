"""Types of the C++ core (data_tools/index/csrc/module.cpp)."""

from collections.abc import Sequence

import numpy as np

SLACK_BYTES: int
SLACK_IDS: int

def kernels() -> list[str]: ...

class RowParser:
    def __init__(self, row_length: int, vocab_size: int, sources: Sequence[str], kernel: str = "") -> None: ...
    def parse(
        self, text: bytearray, start: int, stop: int, ids: np.ndarray, codes: np.ndarray
    ) -> tuple[int, int, int, int, str]: ...
    def format(self, ids: np.ndarray, codes: np.ndarray) -> bytes: ...
