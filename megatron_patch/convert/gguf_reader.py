"""The library's GGUF reader, held to what a file of a model can be: its own believes every length that a file says.

A header may announce 2^63 strings in 100 bytes, strings of gigabytes, arrays of arrays without end, tensors on top of
each other. Here it is read in seconds and in memory of its own size, or refused.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.gguf_reader import ReaderField
from numpy.typing import DTypeLike

_MOST_KEYS = 4096
_MOST_TENSORS = 1 << 16
_MOST_HEADER = 64 << 20  # bytes before the tensors: a vocabulary of 256k pieces and its merges are 10 MiB
_MOST_DIMENSIONS = 4  # ggml's own
_LENGTH = struct.Struct("<Q")


class BoundedReader(gguf.GGUFReader):
    """Keys and tensors of a little-endian GGUF file. Arrays among its values are passed over: their contents are none.

    Raises ValueError or KeyError where it is damaged, beyond a limit, or holds tensors that llama.cpp would refuse:
    each must lie behind the one before.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if self.endianess is not gguf.GGUFEndian.LITTLE:
            raise ValueError("written for big-endian processors")
        at = 0
        for tensor in self.tensors:
            offset = int(tensor.field.parts[-1][0])
            if offset != at:
                raise ValueError(f"{tensor.name} lies at {offset:,}, expected {at:,} behind the tensor before")
            at += -(-tensor.n_bytes // int(self.alignment)) * int(self.alignment)

    def _get(self, offset: int, dtype: DTypeLike, count: int = 1, override_order: Any = None) -> np.ndarray:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"ends within what lies at byte {offset:,}")
        found: np.ndarray = super()._get(offset, dtype, count, override_order)
        return found

    def _get_str(self, offset: int) -> tuple[np.ndarray, np.ndarray]:
        length = self._get(offset, np.uint64)
        self._check_header(offset + 8 + int(length[0]))
        return length, self._get(offset + 8, np.uint8, length[0])

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
        start, count = orig_offs + 12, int(self._get(orig_offs + 4, np.uint64)[0])
        if kind is gguf.GGUFValueType.ARRAY:
            raise ValueError("an array of arrays among its values")
        if kind is gguf.GGUFValueType.STRING:
            end = self._after_strings(start, count)
        else:
            end = start + np.dtype(self.gguf_scalar_to_np[kind]).itemsize * count
        self._check_header(end)
        return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY, kind]

    def _after_strings(self, at: int, count: int) -> int:
        for _ in range(count):
            self._check_header(at + _LENGTH.size)
            at += _LENGTH.size + _LENGTH.unpack_from(self.data.data, at)[0]
        return at

    def _check_header(self, end: int) -> None:
        if end > min(len(self.data), _MOST_HEADER):
            raise ValueError(
                f"its header goes on to byte {end:,}, beyond the file or the {_MOST_HEADER:,} of a model's"
            )

    def _build_fields(self, offs: int, count: int) -> int:
        if count > _MOST_KEYS:
            raise ValueError(f"{count:,} keys, more than {_MOST_KEYS:,}")
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[ReaderField]]:
        if count > _MOST_TENSORS:
            raise ValueError(f"{count:,} tensors, more than {_MOST_TENSORS:,}")
        return super()._build_tensor_info(offs, count)

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        field = super()._get_tensor_info_field(orig_offs)
        if (dimensions := int(field.parts[2][0])) > _MOST_DIMENSIONS:
            raise ValueError(f"{field.name[:80]} has {dimensions:,} dimensions, more than {_MOST_DIMENSIONS}")
        return field
