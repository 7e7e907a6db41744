"""Open a checkpoint and read whole tensors from it, one at a time, whatever layout wrote them.

Needs neither Megatron-Core nor a process group, so export and evaluation read checkpoints with this module alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_patch.model.parameters import Whole, whole_tensors
from megatron_patch.recipe import Recipe
from megatron_patch.train.checkpoint.format import (
    BROKEN,
    INDEX_NAME,
    MARKER_NAME,
    CheckpointError,
    Fragment,
    Index,
    Marker,
    State,
    StoredTensor,
    What,
    check_file,
    read_index,
    read_marker,
    stored_whats,
)


def open_checkpoint(folder: Path | str, verify: bool = True) -> Checkpoint:
    """Open a checkpoint folder for reading; use it as a context manager to close its files.

    `verify` compares every file with its recorded checksum; leave it out only where that was just done.
    Raises CheckpointError naming the file that is missing, damaged or of another version.
    """
    folder = Path(folder)
    marker = read_marker(folder)
    if verify:
        for name, expected in marker.files.items():
            check_file(folder, name, expected)
    return Checkpoint(folder, marker, read_index(folder))


class Checkpoint:
    """A verified checkpoint. Names and shapes are those of `model.parameters.whole_tensors`."""

    def __init__(self, folder: Path, marker: Marker, index: Index) -> None:
        self.folder = folder
        self.index = index
        self.digest = marker.digest
        self._wholes = whole_tensors(index.recipe.model)
        self._files: dict[str, Any] = {}
        self._open_files = ExitStack()
        self._check_tensors()
        self._check_names(marker)

    @property
    def recipe(self) -> Recipe:
        """The recipe the run was trained with."""
        return self.index.recipe

    @property
    def state(self) -> State:
        return self.index.state

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def samples(self) -> int:
        """Rows consumed."""
        return self.state.samples

    @property
    def tokens(self) -> int:
        """Labels trained on."""
        return self.state.tokens

    @property
    def data_digest(self) -> str | None:
        return self.state.data_digest

    @property
    def is_full(self) -> bool:
        """Whether it holds the optimizer's state, so that training can go on from it."""
        return self.index.contents == "full"

    def names(self) -> list[str]:
        """Every tensor of the whole model, in forward order."""
        return list(self._wholes)

    def whole(self, name: str) -> Whole:
        return self._wholes[name]

    def tensor(self, name: str, what: What = "weight") -> torch.Tensor:
        """A whole tensor on the CPU: `weight` in the training precision, the others in fp32.

        Raises CheckpointError where the checkpoint does not hold it (moments of a weights checkpoint).
        """
        whole, stored = self._wholes[name], self.index.tensors[name]
        shape = whole.part_shape(stored.parts)
        parts = [self.elements(name, part, 0, math.prod(shape), what).view(shape) for part in range(stored.parts)]
        return parts[0] if whole.cut is None or len(parts) == 1 else torch.cat(parts, whole.cut)

    def range_of_part(self, name: str, part: int, parts: int, start: int, stop: int, what: What) -> torch.Tensor:
        """Elements [start, stop) of the flattened part `part` of `parts`, read alone where it was stored cut alike."""
        whole, stored = self._wholes[name], self.index.tensors[name]
        if whole.cut is None:
            part, parts = 0, 1
        if parts == stored.parts:
            return self.elements(name, part, start, stop, what)
        return whole.part(self.tensor(name, what), part, parts).reshape(-1)[start:stop]

    def elements(self, name: str, part: int, start: int, stop: int, what: What) -> torch.Tensor:
        """Elements [start, stop) of a flattened part as it is stored."""
        if what not in ("weight", *stored_whats(self.index.contents, "bf16")):
            raise CheckpointError(
                self.folder,
                f"holds weights alone, no {what}",
                "take a full checkpoint (a restart checkpoint, or a milestone that keeps the optimizer)",
            )
        stored_what = what if what in stored_whats(self.index.contents, self.recipe.precision) else "weight"
        stored = self.index.tensors[name]
        out: torch.Tensor | None = None
        for piece in stored.fragments:
            low, high = max(start, piece.offset), min(stop, piece.offset + piece.length)
            if piece.part != part or low >= high:
                continue
            fragment = Fragment(name, piece.part, stored.parts, piece.offset, piece.length)
            values = self._stored(piece.file, fragment, stored_what)[low - piece.offset : high - piece.offset]
            if out is None:
                if high - low == stop - start:
                    return values
                out = values.new_empty(stop - start)
            out[low - start : high - start] = values
        assert out is not None, "coverage was checked when the checkpoint was opened"
        return out

    def _stored(self, file: str, fragment: Fragment, what: What) -> Any:
        """A fragment to take elements from. Raises CheckpointError where its file is not as the index says."""
        key = fragment.key(what)
        try:
            if file not in self._files:
                handle = safe_open(str(self.folder / file), framework="pt", device="cpu")
                self._files[file] = self._open_files.enter_context(handle)
            stored = self._files[file].get_slice(key)
            found = stored.get_shape(), stored.get_dtype()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(self.folder / file, f"{key} cannot be read ({error})", BROKEN) from None
        is_bf16 = self.recipe.precision == "bf16" and what == "weight"
        expected = [fragment.length], "BF16" if is_bf16 else "F32"
        if found != expected:
            raise CheckpointError(self.folder / file, f"{key} is {found}, the index says {expected}", BROKEN)
        return stored

    def check_fragments(self, files: Collection[str]) -> None:
        """Raises CheckpointError where one of these files does not hold its fragments as the index says."""
        whats = stored_whats(self.index.contents, self.recipe.precision)
        for name, tensor in self.index.tensors.items():
            for piece in tensor.fragments:
                if piece.file in files:
                    for what in whats:
                        self._stored(
                            piece.file, Fragment(name, piece.part, tensor.parts, piece.offset, piece.length), what
                        )

    def _check_tensors(self) -> None:
        """Every element of every tensor of the recipe's model stands in the index exactly once."""
        for problem in coverage_problems(self.index.tensors, self._wholes):
            raise CheckpointError(self.folder / INDEX_NAME, problem, "read it with the version that wrote it")

    def _check_names(self, marker: Marker) -> None:
        """Only files whose digests the marker holds are read."""
        for name, tensor in self.index.tensors.items():
            for piece in tensor.fragments:
                if piece.file not in marker.files:
                    problem = f"{name} is in {piece.file}, which {MARKER_NAME} does not list"
                    raise CheckpointError(self.folder / INDEX_NAME, problem, BROKEN)

    def close(self) -> None:
        self._open_files.close()
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def coverage_problems(tensors: Mapping[str, StoredTensor], wholes: Mapping[str, Whole]) -> Iterator[str]:
    """What keeps fragments from holding every element of every whole tensor exactly once."""
    if tensors.keys() != wholes.keys():
        odd = sorted(tensors.keys() ^ wholes.keys())
        some = ", ".join(name[:80] for name in odd[:3])
        yield f"tensors differ from those of the recipe's model: {some} ({len(odd)} in all)"
        return
    for name, stored in tensors.items():
        whole = wholes[name]
        if (stored.shape, stored.cut) != (whole.shape, whole.cut):
            yield f"{name}: shape {stored.shape} cut at {stored.cut}, the model's is {whole.shape} cut at {whole.cut}"
            continue
        if stored.parts > 1 and (whole.cut is None or whole.shape[whole.cut] % stored.parts):
            yield f"{name}: {stored.parts} parts, which its shape {whole.shape} cut at {whole.cut} cannot have"
            continue
        size = math.prod(whole.part_shape(stored.parts))
        part = end = 0  # where the next fragment must begin
        for f in sorted(stored.fragments, key=lambda f: (f.part, f.offset)):
            if (f.part, f.offset) != (part, end) or end + f.length > size:
                break
            part, end = (part, end + f.length) if end + f.length < size else (part + 1, 0)
        else:
            if part == stored.parts:
                continue
        yield f"{name}: fragments do not cover it once; first gap or overlap at (part, element) {(part, end)}"
