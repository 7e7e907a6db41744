"""Rows of the tokenised sources, read in the order in which `mix` distributes them over segments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from data_tools.dataset.format import TOKEN_DTYPE
from data_tools.files.digest import digest_file
from data_tools.files.durable import errors_named
from data_tools.files.errors import DataError
from data_tools.files.json_file import fields_named, read_sealed
from data_tools.files.plain_file import file_size, read_exactly

SOURCE_MANIFEST = "source.json"
PAGE_BYTES = 1 << 12
"""A part has a digest for each so many bytes: a row is checked by reading no more than the pages it lies in."""
_READ_IDS = 1 << 18  # at a time, so that the digests find them in the cache


def page_digests(content: memoryview) -> np.ndarray:
    """XXH3-64 of each page of a part's bytes, the last one short: uint64 little-endian [pages]."""
    pages = (content[at : at + PAGE_BYTES] for at in range(0, len(content), PAGE_BYTES))
    return np.fromiter(map(xxhash.xxh3_64_intdigest, pages), dtype="<u8")


class SourceRows:
    """The rows of one source: ids [i * row_length, (i + 1) * row_length) of its parts, one after the other.

    Attributes:
        manifest: the source's manifest.
        rows: number of whole rows.
    """

    def __init__(self, folder: Path) -> None:
        """Raises DataError where the source is not finished, its manifest is damaged or a part has the wrong size."""
        path = folder / SOURCE_MANIFEST
        self.manifest = read_sealed(path, "run data_tools/build_amber.py tokenize to the end")
        with fields_named(path, "run tokenize again"):
            self.name: str = self.manifest["source"]
            self.rows: int = self.manifest["rows"]
            self.row_length: int = self.manifest["row_length"]
            self._paths = [folder / f"{part['name']}.tokens" for part in self.manifest["parts"]]
            counts = [part["tokens"] for part in self.manifest["parts"]]
            self._digests = [part["pages_digest"] for part in self.manifest["parts"]]
        if self.name != folder.name:
            raise DataError(f"is the record of {self.name}", file=path, remedy=f"name its folder {self.name}")
        self._pages: tuple[int, np.ndarray] = -1, np.empty(0)
        self._bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        for path, count in zip(self._paths, counts, strict=True):
            if file_size(path) != count * TOKEN_DTYPE.itemsize:
                raise DataError(
                    f"{file_size(path)} bytes, but its manifest lists {count} ids",
                    file=path,
                    remedy=f"remove {path.with_suffix('.json')} and run tokenize again",
                )

    def read(self, start: int, count: int) -> np.ndarray:
        """Rows [start, start + count).

        Returns:
            uint16 [count, row_length].

        Raises:
            DataError: they are not what `tokenize` wrote.
        """
        first, last = start * self.row_length, (start + count) * self.row_length
        ids = np.empty(last - first, dtype=TOKEN_DTYPE)
        part = int(np.searchsorted(self._bounds, first, side="right")) - 1
        filled = 0
        while filled < len(ids):
            offset = first + filled - int(self._bounds[part])
            left = int(self._bounds[part + 1]) - int(self._bounds[part]) - offset
            take = min(left, len(ids) - filled, _READ_IDS)
            if take > 0:
                ids[filled : filled + take] = self._read_part(part, offset, take)
                filled += take
            part += take == left
        return ids.reshape(count, self.row_length)

    def _read_part(self, part: int, offset: int, count: int) -> np.ndarray:
        """Ids [offset, offset + count) of a part, read with the whole pages that they lie in, which are checked."""
        path, itemsize = self._paths[part], TOKEN_DTYPE.itemsize
        size = int(self._bounds[part + 1] - self._bounds[part]) * itemsize
        first = offset * itemsize // PAGE_BYTES
        last = -(-(offset + count) * itemsize // PAGE_BYTES)
        start = first * PAGE_BYTES
        content = np.empty(min(last * PAGE_BYTES, size) - start, dtype=np.uint8)
        with errors_named(path), path.open("rb", buffering=0) as stream:
            stream.seek(start)
            read_exactly(stream, content.data, path)
        differs = np.flatnonzero(page_digests(content.data) != self._digests_of(part)[first:last])
        if len(differs):
            at = start + int(differs[0]) * PAGE_BYTES
            raise DataError(
                f"damaged within {PAGE_BYTES} bytes from byte {at}: not what tokenize wrote",
                file=path,
                remedy=f"remove {path.with_suffix('.json')} and run tokenize again",
            )
        return content.view(TOKEN_DTYPE)[offset - start // itemsize :][:count]

    def _digests_of(self, part: int) -> np.ndarray:
        if self._pages[0] != part:  # rows are read in their order, so one part's are enough
            path = self._paths[part].with_suffix(".pages")
            if not path.is_file() or digest_file(path) != self._digests[part]:
                raise DataError(
                    "missing or damaged",
                    file=path,
                    remedy=f"remove {path.with_suffix('.json')} and run tokenize again",
                )
            self._pages = part, np.fromfile(path, dtype="<u8")
        return self._pages[1]


class MixedRows:
    """All rows of all sources in the order of their list, without those held out.

    Attributes:
        names: the list; a row's source code is a position in it.
        rows: number of rows.
        held_out: by source, the sorted row numbers kept away.
    """

    def __init__(
        self,
        sources: Sequence[SourceRows],
        names: tuple[str, ...],
        held_out_per_source: int,
        seed: int,
        apart: Sequence[SourceRows] = (),
    ) -> None:
        """Chooses `held_out_per_source` rows of each source by `seed`.

        `apart` are rows of documents that are held out whole, and stand in no source.

        Raises:
            DataError: a source has no rows to spare.
        """
        self.names = names
        self._apart, self._seed = apart, seed
        self.sources = sorted(sources, key=lambda source: names.index(source.name))
        self.held_out: list[np.ndarray] = []
        for source in self.sources:
            if held_out_per_source and source.rows <= held_out_per_source:
                raise DataError(
                    f"{source.rows} rows, {held_out_per_source} of them to hold out",
                    file=source.name,
                    remedy="hold out fewer rows with --held-out-per-source",
                )
            # A generator of its own for each source, so that one source more or less does not change the others.
            random = np.random.RandomState((seed + names.index(source.name)) % (1 << 32))
            chosen = random.permutation(source.rows)[:held_out_per_source] if held_out_per_source else np.empty(0)
            self.held_out.append(np.sort(chosen).astype(np.int64))
        self._bounds = np.concatenate(
            [
                [0],
                np.cumsum([s.rows - len(h) for s, h in zip(self.sources, self.held_out, strict=True)], dtype=np.int64),
            ]
        )
        self.rows = int(self._bounds[-1])

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [start, start + count) of the mix.

        Returns:
            uint16 [count, row_length] ids and uint8 [count] source codes.
        """
        pieces: list[np.ndarray] = []
        codes = np.empty(count, dtype=np.uint8)
        done = 0
        while done < count:
            at = int(np.searchsorted(self._bounds, start + done, side="right")) - 1
            first = start + done - int(self._bounds[at])
            take = min(int(self._bounds[at + 1]) - int(self._bounds[at]) - first, count - done)
            pieces.append(_read_kept(self.sources[at], self.held_out[at], first, take))
            codes[done : done + take] = self.names.index(self.sources[at].name)
            done += take
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)), codes

    def read_held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """All held-out rows: uint16 [n, row_length] ids and uint8 [n] source codes, in the order of the sources.

        Rows of documents held out whole in an order drawn by the seed: the first N are a sample of all.
        """
        if self._apart:
            order = np.random.RandomState(self._seed % (1 << 32)).permutation(
                sum(source.rows for source in self._apart)
            )
            ids = np.concatenate([source.read(0, source.rows) for source in self._apart])
            counts = [source.rows for source in self._apart]
            codes = np.repeat([self.names.index(source.name) for source in self._apart], counts).astype(np.uint8)
            return ids[order], codes[order]
        rows = [
            np.concatenate([source.read(int(row), 1) for row in held])
            for source, held in zip(self.sources, self.held_out, strict=True)
        ]
        codes_by_source = [
            np.full(len(held), self.names.index(source.name), dtype=np.uint8)
            for source, held in zip(self.sources, self.held_out, strict=True)
        ]
        return np.concatenate(rows), np.concatenate(codes_by_source)

    def codes(self, segment: int, num_segments: int, rounds: int) -> list[bytes]:
        """Source codes of a segment's rows, in blocks: row j of the segment is row j * num_segments + segment here."""
        blocks = []
        for i, source in enumerate(self.sources):
            # Rows of this source lie in [first, last) of the segment.
            first, last = (
                min(rounds, max(0, -((segment - int(bound)) // num_segments))) for bound in self._bounds[i : i + 2]
            )
            blocks.append(bytes([self.names.index(source.name)]) * (last - first))
        return blocks


def _read_kept(source: SourceRows, held: np.ndarray, first: int, count: int) -> np.ndarray:
    """Rows [first, first + count) of a source's rows without the held-out ones."""
    # held[i] - i rows lie before the i-th held-out row, so kept row k is row k plus the held-out rows before it.
    kept_before = held - np.arange(len(held))
    start = first + int(np.searchsorted(kept_before, first, side="right"))
    stop = first + count + int(np.searchsorted(kept_before, first + count - 1, side="right"))
    rows = source.read(start, stop - start)
    inside = held[(held >= start) & (held < stop)] - start
    return np.delete(rows, inside, axis=0) if len(inside) else rows


def open_sources(folder: Path, names: tuple[str, ...], like: SourceRows | None = None) -> list[SourceRows]:
    """Every source of `names` under `folder` that `tokenize` has finished, in that order.

    With `like`, their row length and tokenizer must be those of that source.

    Raises:
        DataError: none is there, there is one that `names` does not list, or they differ in row length or tokenizer.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and path.name not in names and not path.name.startswith("."):
            raise DataError(
                f"no source of this mix; its sources are {', '.join(names)}",
                file=path,
                remedy="list it under `sources` of the --config file, move it away, or use another --output",
            )
    sources = [SourceRows(folder / name) for name in names if (folder / name).is_dir()]
    if not sources:
        raise DataError("no tokenised source", file=folder, remedy="run data_tools/build_amber.py tokenize first")
    first = (like or sources[0]).manifest
    for source in sources:
        for field in ("row_length", "tokenizer", "eos_id"):
            if source.manifest[field] != first[field]:
                raise DataError(
                    f"{field} {source.manifest[field]} differs from {first['source']}'s {first[field]}",
                    file=folder / source.name / SOURCE_MANIFEST,
                    remedy="tokenise all sources with the same tokenizer and --row-length",
                )
    return sources
