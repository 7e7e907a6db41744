"""A checkpoint whose index and marker were made to agree on what cannot be: refused by name, at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.files.digest import digest_file
from megatron_patch.train.checkpoint import CheckpointError, open_checkpoint, write_weights
from megatron_patch.train.checkpoint.format import Marker, StoredFile, read_index, to_json
from tests.convert.samples import MemoryWeights, small_recipe

NORM = "final_layernorm.weight"  # 32 elements in one part
FC2 = "ffn.linear_fc2.weight"  # 32 x 48, cut along 48


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_weights(MemoryWeights(small_recipe()), tmp_path / "ckpt")
    return tmp_path / "ckpt"


def seal(folder: Path, index: bytes) -> None:
    """A marker that vouches for this index."""
    (folder / "index.json").write_bytes(index)
    files = {
        f.name: StoredFile(bytes=f.stat().st_size, xxh3_128=digest_file(f))
        for f in folder.iterdir()
        if f.name != "COMPLETE"
    }
    (folder / "COMPLETE").write_bytes(to_json(Marker.of(files)))


def fragment(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["tensors"][NORM]["fragments"][0].update(change)


def tensor(name: str, **change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["tensors"][name].update(change)


def pieces(name: str, *spans: tuple[int, int, int], parts: int = 1) -> Callable[[dict[str, Any]], None]:
    """The fragments of a tensor as (part, offset, length)."""
    made = [{"file": "rank_00000.safetensors", "part": p, "offset": o, "length": n} for p, o, n in spans]
    return tensor(name, fragments=made, parts=parts)


NOT_COVERED = "do not cover it once; first gap or overlap at"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fragment(file="../other.safetensors"), "fragments.0.file"),
        (fragment(file="/dev/zero"), "fragments.0.file"),
        (fragment(file="rank_00001.safetensors"), "which COMPLETE does not list"),
        (fragment(file="index.json"), "fragments.0.file"),
        (fragment(length=10**400), "fragments.0.length"),
        (fragment(offset=-1), "fragments.0.offset"),
        (fragment(length=33), NOT_COVERED),
        (fragment(part=1), NOT_COVERED),
        (tensor(NORM, parts=10**12), "1000000000000 parts, which its shape (32,) cut at None cannot have"),
        (tensor(FC2, parts=10**12), "1000000000000 parts, which its shape (32, 48) cut at 1 cannot have"),
        (tensor(FC2, parts=5), "5 parts, which"),
        (pieces(FC2, (0, 0, 768), (0, 768, 768), parts=2), NOT_COVERED),  # what is part 1's under part 0's name
        (pieces(FC2, (0, 0, 768), (1, 0, 700), parts=2), f"{NOT_COVERED} (part, element) (1, 700)"),
        (pieces(NORM, (0, 0, 20), (0, 10, 22)), f"{NOT_COVERED} (part, element) (0, 20)"),
        (pieces(NORM, *[(0, i, 1) for i in range(31)]), f"{NOT_COVERED} (part, element) (0, 31)"),
        (pieces(NORM), NOT_COVERED),
        (tensor(NORM, shape=[32] * 100_000), ".shape: Tuple should have at most 8 items"),
        (tensor(NORM, cut=10**30), "cut"),
        (lambda index: index["state"].update(step=2**63), "state.step"),
        (lambda index: index["state"].update(step=True), "state.step"),
        (lambda index: index["recipe"]["model"].update(num_layers=10**9), "recipe.model.num_layers"),
        (lambda index: index["tensors"].pop(NORM), "tensors differ from those of the recipe's model"),
        (lambda index: index["environment"].update(a=json.loads("[" * 500 + "]" * 500)), "recursion limit"),
    ],
)
def test_what_an_index_cannot_say(change: Callable[[dict[str, Any]], None], words: str, folder: Path) -> None:
    index = json.loads((folder / "index.json").read_bytes())
    change(index)
    seal(folder, json.dumps(index).encode())
    with pytest.raises(CheckpointError, match=re.escape(words)) as refused:
        open_checkpoint(folder)
    assert str(refused.value).startswith(f"{folder}/index.json: ") and len(str(refused.value)) < 1500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 1_000_000, "recursion limit"),
        (b"1" * 1_000_000, "not an index"),
        (b" " * (65 << 20), "more than 67,108,864 bytes"),
    ],
)
def test_an_index_without_end(content: bytes, words: str, folder: Path) -> None:
    seal(folder, content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../elsewhere", "/dev/zero", "COMPLETE", "rank_0.safetensors", "a\nb"])
def test_a_marker_vouches_for_files_of_its_folder_alone(name: str, folder: Path) -> None:
    marker = json.loads((folder / "COMPLETE").read_bytes())
    marker["files"][name] = {"bytes": 0, "xxh3_128": "0" * 32}
    (folder / "COMPLETE").write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="COMPLETE: damaged"):
        open_checkpoint(folder)


def test_a_pipe_in_a_file_s_place_is_not_waited_for(folder: Path) -> None:
    file = folder / "rank_00000.safetensors"
    file.unlink()
    os.mkfifo(file)
    marker = json.loads((folder / "COMPLETE").read_bytes())
    files = {name: StoredFile(**stored) for name, stored in marker["files"].items()}
    files[file.name] = StoredFile(bytes=0, xxh3_128="0" * 32)
    (folder / "COMPLETE").write_bytes(to_json(Marker.of(files)))
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: cannot be read"):
        open_checkpoint(folder)
    assert read_index(folder).contents == "weights"
