"""What stands in a checkpoint folder, whatever layout wrote it.

    rank_00000.safetensors   fragments, written by the ranks side by side
    ...
    index.json               `Index`: position, recipe, data set, and where every fragment of every whole tensor is
    COMPLETE                 `Marker`: size and XXH3-128 of every file above; written last

A fragment is a contiguous range of a whole-model tensor's tensor-parallel part, flattened: what one data-parallel
rank's ZeRO shard holds of it. Its key in the safetensors file says which, so the files explain themselves:

    ffn.linear_fc1.weight/0-2/4096/exp_avg      tensor, part 0 of 2, first element 4096 of the part, what it holds

A full checkpoint holds of every fragment its weight, both AdamW moments and, in bf16 training, the fp32 master weight
(in fp32 training the weight is the master). A weights checkpoint holds the weights alone. Nothing here is pickled.

There is no random state in it, because nothing draws from one: initial values are a function of (seed, name), the order
of rows is one of (seed, segment), and the model has no dropout. The learning rate is a function of the step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_tools.files.bounded_json import load_bounded, read_bounded
from data_tools.files.digest import digest_file, new_digest
from data_tools.files.json_file import canonical_json
from megatron_patch.recipe import Recipe

INDEX_NAME = "index.json"
MARKER_NAME = "COMPLETE"
MOST_INDEX_BYTES = 64 << 20
"""Some ten times what 10,000 ranks write."""

What = Literal["weight", "master", "exp_avg", "exp_avg_sq"]
Contents = Literal["full", "weights"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written: names the file, what is wrong and what to do."""

    def __init__(self, file: Path, message: str, remedy: str) -> None:
        self.file = file
        super().__init__(f"{file}: {message}\n  remedy: {remedy}")


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + length) of part `part` of `parts` of a whole tensor, the part flattened."""

    name: str
    part: int
    parts: int
    offset: int
    length: int

    def key(self, what: What) -> str:
        return f"{self.name}/{self.part}-{self.parts}/{self.offset}/{what}"


_KEY = re.compile(r"([^/]+)/(\d+)-(\d+)/(\d+)/(" + "|".join(get_args(What)) + ")")


def parse_key(key: str, length: int) -> tuple[Fragment, What]:
    """The fragment of a safetensors key and what of it is stored; ValueError where it is no such key."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key!r} is not TENSOR/PART-PARTS/OFFSET/WHAT")
    name, part, parts, offset, what = match.groups()
    return Fragment(name, int(part), int(parts), int(offset), length), what  # type: ignore[return-value]


def stored_whats(contents: Contents, precision: str) -> tuple[What, ...]:
    """What is written of every fragment."""
    if contents == "weights":
        return ("weight",)
    return ("weight", "master", "exp_avg", "exp_avg_sq") if precision == "bf16" else ("weight", "exp_avg", "exp_avg_sq")


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


class _Json(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_RankFile = Annotated[str, Field(pattern=r"^rank_\d{5,7}\.safetensors$")]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class State(_Json):
    """Where a run stands, apart from its tensors."""

    step: _Count = Field(description="Optimizer steps done, skipped ones included.")
    samples: _Count = Field(description="Rows consumed: the position in the data.")
    tokens: _Count = Field(description="Labels consumed, those of skipped steps included.")
    optimizer_step: _Count = Field(description="AdamW updates done, for its bias correction.")
    data_digest: str | None = Field(description="Digest of the data set's manifest; null: not from a data set.")
    spike_window: list[float] = Field(default=[], description="Losses the watchdog compares the next one with.")
    withheld: list[float | None] = Field(default=[], description="Losses withheld in a row; null: not finite.")
    accepted_changes: list[str] = Field(default=[], description="Changes that --accept-changes let pass, in order.")

    def after_batch(self, rows: int, tokens: int, spike_window: list[float], withheld: list[float | None]) -> State:
        """One step on; `optimizer_step` is filled in when it is saved."""
        return self.model_copy(
            update={
                "step": self.step + 1,
                "samples": self.samples + rows,
                "tokens": self.tokens + tokens,
                "spike_window": spike_window,
                "withheld": withheld,
            }
        )


class StoredFragment(_Json):
    file: _RankFile
    part: _Count
    offset: _Count
    length: _Count = Field(gt=0)


class StoredTensor(_Json):
    shape: tuple[_Count, ...] = Field(max_length=8)
    cut: _Count | None = Field(description="Dimension along which the parts are cut; null: one part.")
    parts: _Count = Field(gt=0)
    fragments: list[StoredFragment] = Field(description="By part and offset; together every element once.")


class Index(_Json):
    """`index.json`."""

    version: Literal[1] = 1
    contents: Contents
    state: State
    recipe: Recipe
    layout: str = Field(description="The layout that wrote it, for people; reading does not depend on it.")
    environment: dict[str, str]
    tensors: dict[str, StoredTensor]


class StoredFile(_Json):
    bytes: _Count
    xxh3_128: _Digest


class Marker(_Json):
    """`COMPLETE`: its presence says that the folder was finished, its digests that it still is what was written."""

    version: Literal[1] = 1
    files: dict[_RankFile | Literal["index.json"], StoredFile]
    digest: _Digest = Field(description="XXH3-128 of `files`: names the checkpoint's content.")

    @classmethod
    def of(cls, files: dict[str, StoredFile]) -> Marker:
        return cls(files=files, digest=_digest_of(files))


def _digest_of(files: dict[str, StoredFile]) -> str:
    digest = new_digest()
    digest.update(canonical_json({name: file.model_dump() for name, file in files.items()}))
    return str(digest.hexdigest())


def to_json(value: BaseModel) -> bytes:
    return canonical_json(value.model_dump(mode="json"))


GONE = "name one that is there; a run keeps its milestones and the newest `checkpoint.keep` others"
BROKEN = "use another checkpoint of the run; `train` falls back to the newest good one by itself"


def read_marker(folder: Path) -> Marker:
    """Raises CheckpointError where the checkpoint was never finished or the marker is damaged."""
    path = folder / MARKER_NAME
    try:
        content = read_bounded(path)
        marker = Marker.model_validate_json(content)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise CheckpointError(folder, "there is no such checkpoint", GONE) from None
        raise CheckpointError(path, "missing: this is no finished checkpoint", BROKEN) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        raise CheckpointError(path, f"damaged ({_first(error)})", BROKEN) from None
    if content != to_json(Marker.of(marker.files)) or INDEX_NAME not in marker.files:
        raise CheckpointError(path, "damaged (its content does not match its digest)", BROKEN)
    return marker


def said_digest(folder: Path) -> str | None:
    """What the marker says the content's digest is, unproved: enough to tell whether that was looked at before."""
    try:
        marker = load_bounded(folder / MARKER_NAME)
    except (OSError, ValueError):
        return None
    return marker.get("digest") if isinstance(marker, dict) else None


def check_file(folder: Path, name: str, expected: StoredFile) -> None:
    """Raises CheckpointError where a file is missing, cannot be read or is not what was written."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(path, f"{size} bytes, but {expected.bytes} were written", BROKEN)
        digest = digest_file(path)
    except FileNotFoundError:
        raise CheckpointError(path, "missing", BROKEN) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if digest != expected.xxh3_128:
        raise CheckpointError(path, "damaged (its XXH3-128 is not the one recorded when it was written)", BROKEN)


def read_index(folder: Path) -> Index:
    """Raises CheckpointError where the index cannot be read or does not fit this version of the repository."""
    path = folder / INDEX_NAME
    try:
        return Index.model_validate_json(read_bounded(path, MOST_INDEX_BYTES))
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        raise CheckpointError(
            path, f"not an index of version 1 ({_first(error)})", "read it with the version that wrote it"
        ) from None


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(path, f"cannot be read ({error.strerror})", BROKEN)


def _first(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    detail: Any = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part)[:80] for part in detail["loc"][:8])
    return f"{place}: {detail['msg']}"[:400] if place else detail["msg"][:400]
