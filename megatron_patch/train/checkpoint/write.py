"""Put a checkpoint on disk: durable or absent.

The order is: every rank's file, written into a folder beside the final one, flushed to the disk, read back and
compared; the index; the rename; the marker. Whatever moment a process dies at, a folder with a marker is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data_tools.files.digest import digest_file, new_digest
from data_tools.files.durable import fsync_folder, new_folder, share_like_folder, take_place, write_whole
from megatron_patch.model.parameters import whole_tensors
from megatron_patch.recipe import Recipe
from megatron_patch.train.checkpoint.format import (
    INDEX_NAME,
    MARKER_NAME,
    CheckpointError,
    Contents,
    Fragment,
    Index,
    Marker,
    State,
    StoredFile,
    StoredFragment,
    StoredTensor,
    What,
    parse_key,
    rank_file,
    stored_whats,
    to_json,
)
from megatron_patch.train.checkpoint.reader import coverage_problems


class Weights(Protocol):
    """Whole-model weights with their provenance, e.g. an imported Hugging Face folder."""

    recipe: Recipe
    step: int
    samples: int
    tokens: int
    data_digest: str | None

    def tensor(self, name: str) -> torch.Tensor: ...


def write_weights(source: Weights, folder: Path) -> Marker:
    """Write whole tensors as a weights checkpoint from one process.

    Raises DataError where the folder is already there or another process writes it, OSError where it cannot be written.
    """
    tensors = {
        Fragment(whole.name, 0, 1, 0, 0).key("weight"): source.tensor(whole.name).reshape(-1).contiguous()
        for whole in whole_tensors(source.recipe.model).values()
    }
    state = State(
        step=source.step,
        samples=source.samples,
        tokens=source.tokens,
        optimizer_step=0,
        data_digest=source.data_digest,
    )
    beside = partial_folder(folder)
    with new_folder(folder, beside):
        files = {rank_file(0): write_file(beside / rank_file(0), tensors)}
        index = Index(
            contents="weights",
            state=state,
            recipe=source.recipe,
            layout="whole tensors",
            environment={"torch": torch.__version__},
            tensors=index_tensors(beside, files, source.recipe, "weights"),
        )
        return finish(beside, folder, files, index)


def partial_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return final.with_name(f".{final.name}.partial")


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> StoredFile:
    """Write one rank's fragments, flush them to the disk, read them back from there and compare.

    Raises CheckpointError where what was read is not what was written, OSError where the disk is full or gone.
    """
    try:
        save_file(dict(tensors), path)
        share_like_folder(path)
    except Exception as error:  # safetensors wraps the operating system's errors in a type of its own
        raise CheckpointError(path, f"cannot be written ({error})", "free space, or see to the file system") from error
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    digest = digest_file(path)
    if digest != _digest_in_memory(path, tensors):
        raise CheckpointError(path, "read back from the disk it is not what was written", "see to the disk")
    return StoredFile(bytes=path.stat().st_size, xxh3_128=digest)


def _digest_in_memory(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """XXH3-128 of what the file should be: its header, then the tensors of memory in the header's order."""
    with path.open("rb") as stream:
        prefix = stream.read(8)
        header = stream.read(int.from_bytes(prefix, "little"))
    digest = new_digest()
    digest.update(prefix + header)
    for key in sorted(tensors, key=_offsets(header).__getitem__):
        digest.update(tensors[key].view(torch.uint8).numpy())
    return str(digest.hexdigest())


def _offsets(header: bytes) -> dict[str, int]:
    return {key: entry["data_offsets"][0] for key, entry in json.loads(header).items() if key != "__metadata__"}


def index_tensors(
    folder: Path, files: Mapping[str, StoredFile], recipe: Recipe, contents: Contents
) -> dict[str, StoredTensor]:
    """Where every fragment is, from the headers of the written files.

    Raises CheckpointError where they do not hold every element of every tensor once.
    """
    found: dict[What, dict[str, dict[str, Any]]] = {what: {} for what in stored_whats(contents, recipe.precision)}
    for file in sorted(files):
        with safe_open(str(folder / file), framework="pt", device="cpu") as stored:
            for key in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
                piece, what = parse_key(key, stored.get_slice(key).get_shape()[0])
                tensor = found[what].setdefault(piece.name, {"parts": piece.parts, "fragments": []})
                tensor["fragments"].append(
                    StoredFragment(file=file, part=piece.part, offset=piece.offset, length=piece.length)
                )
    wholes = whole_tensors(recipe.model)
    for what, tensors in found.items():
        for tensor in tensors.values():
            tensor["fragments"].sort(key=lambda f: (f.part, f.offset))
        if tensors != found["weight"]:
            raise CheckpointError(folder, f"{what} is not stored as the weights are", "report this: it is a bug")
    index = {
        name: StoredTensor(shape=whole.shape, cut=whole.cut, **found["weight"][name])
        for name, whole in wholes.items()
        if name in found["weight"]
    }
    for problem in coverage_problems(index, wholes):
        raise CheckpointError(folder, problem, "report this: it is a bug")
    return index


def finish(
    beside: Path,
    final: Path,
    files: dict[str, StoredFile],
    index: Index,
    make_way: Callable[[Path, Marker], None] | None = None,
) -> Marker:
    """Index, rename and marker, each durable before the next.

    With `make_way` it takes the place of an earlier folder of that name, which `make_way` may move elsewhere, once the
    new marker's digest can be compared with its own. Without, raises DataError where something of that name came
    meanwhile.
    """
    write_whole(beside / INDEX_NAME, to_json(index))
    files = {
        **files,
        INDEX_NAME: StoredFile(bytes=(beside / INDEX_NAME).stat().st_size, xxh3_128=digest_file(beside / INDEX_NAME)),
    }
    fsync_folder(beside)
    marker = Marker.of(files)
    if make_way is not None:
        make_way(final, marker)
        remove(final)
    take_place(beside, final)
    fsync_folder(final.parent)
    write_whole(final / MARKER_NAME, to_json(marker))
    return marker


def remove(folder: Path) -> None:
    """Delete a checkpoint, marker first, so that one half deleted is not taken for a good one.

    Of one that was moved elsewhere and linked to, the link alone: what lies elsewhere is not ours to delete.
    """
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        (folder / MARKER_NAME).unlink(missing_ok=True)
        fsync_folder(folder)
        shutil.rmtree(folder)
