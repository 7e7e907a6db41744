"""LLaVA's conversations to rows that point to images in stock webdataset shards."""

from __future__ import annotations

import dataclasses
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_tools.build_vision import build_parser, run
from data_tools.chat.template import ChatTokenizer
from data_tools.dataset.format import DatasetManifest, unpack_marks
from data_tools.dataset.images import read_image, read_images_index
from data_tools.files.digest import digest_file
from data_tools.files.errors import DataError
from data_tools.index import row_blocks
from data_tools.index.verify import verify
from data_tools.index.verify_images import row_faults
from data_tools.vision import parts
from tests.convert.samples import train_tokenizer
from tests.data_tools.vision.pictures import bad, encoded, good, photograph

ROW, TOKENS = 130, 9
BAD = bad()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def entry(number: int, images: list[str] | str | None, asked: str = "<image>\nthe quick", said: str = "fox") -> dict:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"{said} {number}"}]
    return {"id": str(number), "conversations": turns} | ({} if images is None else {"image": images})


def write_folder(folder: Path, count: int = 40) -> list[dict]:
    """Entries about one image, the same image again, two images, none; and their images, in a folder of folders."""
    (folder / "images/sub").mkdir(parents=True)
    forms = sorted(good().items())
    for number in range(count):
        name, content = forms[number % len(forms)]
        if number >= len(forms):
            name, content = f"{number}.png", encoded(photograph(20, 20 + number, seed=number), "png")
        (folder / "images/sub" / name).write_bytes(content)
    paths = sorted(f"sub/{path.name}" for path in (folder / "images/sub").iterdir())
    entries = []
    for number in range(count):
        kind = number % 4
        if kind == 0:
            entries.append(entry(number, paths[number]))
        elif kind == 1:  # LLaVA puts the image behind the question now and then
            entries.append(entry(number, paths[number - 1], "jumps over\n<image>"))
        elif kind == 2:
            entries.append(entry(number, [paths[number], paths[number - 1]], "<image> and <image>: same?"))
        else:
            entries.append(entry(number, None, "brown"))
    (folder / "in.json").write_text(json.dumps(entries))
    return entries


def build(folder: Path, tokenizer: Path, *more: str, output: str = "data") -> DatasetManifest:
    arguments = ["build", "--input", str(folder / "in.json"), "--images", str(folder / "images")]
    arguments += ["--output", str(folder / output), "--tokenizer", str(tokenizer), "--image-tokens", str(TOKENS)]
    run(build_parser().parse_args([*arguments, "--row-length", str(ROW), "--workers", "1", *more]))
    return DatasetManifest.read(folder / output / "manifest.json")


def stored(folder: Path, name: str) -> list[tuple[tuple[int, ...], list[int]]]:
    """Of each conversation of a segment its ids and the numbers of its images."""
    rows = np.fromfile(folder / f"{name}.bin", "<u2").reshape(-1, ROW)
    starts = unpack_marks(np.fromfile(folder / f"{name}.starts", np.uint8).reshape(len(rows), -1), ROW)
    images = np.fromfile(folder / f"{name}.images", "<i4").reshape(len(rows), -1)
    found = []
    for row, begins, numbers in zip(rows, starts, images.tolist(), strict=True):
        left = [number for number in numbers if number >= 0]
        for part in np.split(row, np.flatnonzero(begins)[1:]):
            if part.any():
                own = int((part == 1).sum()) // TOKENS
                found.append((tuple(part.tolist()), left[:own]))
                left = left[own:]
        assert not left
    return found


def test_every_conversation_is_in_a_row_with_its_images(tmp_path: Path, tokenizer: Path) -> None:
    """By an oracle of the test's own: stock `transformers` renders, the files of the folder are the images."""
    import webdataset

    entries = write_folder(tmp_path)
    manifest = build(tmp_path, tokenizer, "--held-out-rows", "2")
    folder = tmp_path / "data"
    assert verify(folder) == []
    images = manifest.images
    assert images is not None and images.placeholder_id == 1
    index = read_images_index(folder, images)
    content = [read_image(folder, images, index, number) for number in range(images.count)]
    rendered = ChatTokenizer(tokenizer, Path("data_tools/chat/mobillama.jinja"))
    expected = []
    for made in entries:
        named = made.get("image", [])
        paths = [named] if isinstance(named, str) else named
        asked = made["conversations"][0]["value"]
        if len(paths) == 1:
            asked = "<image>\n" + asked.replace("<image>", "").strip()
        messages = [
            {"role": "user", "content": asked.replace("<image>", "<s>" * TOKENS)},
            {"role": "assistant", "content": made["conversations"][1]["value"]},
        ]
        files = [(tmp_path / "images" / path).read_bytes() for path in paths]
        expected.append((tuple(rendered.encode(messages, but="<s>").ids.tolist()), files))
    found = [
        (ids, [content[number] for number in numbers])
        for name in ("segment_000", "held_out")
        for ids, numbers in stored(folder, name)
    ]
    assert sorted(found) == sorted(expected)
    shards = webdataset.WebDataset([str(folder / s.name) for s in images.shards], shardshuffle=False)
    read = [next(v for k, v in s.items() if k not in ("json", "__key__", "__url__") and k[0] != "_") for s in shards]
    assert read == content


def test_the_bytes_depend_on_no_worker_and_no_interruption(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    monkeypatch.setattr(parts.Reading, "part", 7)
    monkeypatch.setattr(parts.Reading.__init__, "__defaults__", (7,))
    whole = build(tmp_path, tokenizer)
    assert whole.images is not None and len(whole.images.shards) == 6
    first = parts._write

    def write_three(base: Path, *rest: object) -> None:
        if base.name == "part_00003":
            raise KeyboardInterrupt
        first(base, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "_write", write_three)
        build(tmp_path, tokenizer, output="again")
    assert not (tmp_path / "again/manifest.json").exists()
    monkeypatch.setattr(parts, "_TEXTS", 3)
    monkeypatch.setattr(parts, "_PICTURES", 2)
    assert build(tmp_path, tokenizer, "--workers", "2", output="again").digest == whole.digest
    (tmp_path / "images/sub/plain.png").unlink()  # finished parts are not read again
    assert build(tmp_path, tokenizer, output="again").digest == whole.digest
    with pytest.raises(DataError, match="made from other input"):
        build(tmp_path, tokenizer, "--image-tokens", "4", output="again")


def test_bad_images_and_entries_are_named(tmp_path: Path, tokenizer: Path) -> None:
    entries = write_folder(tmp_path)
    for name, (content, _) in BAD.items():
        (tmp_path / "images" / name).write_bytes(content)
    (tmp_path / "images/folder.jpg").mkdir()
    os.mkfifo(tmp_path / "images/pipe.jpg")
    odd = {
        "No such file": entry(1, "missing.jpg"),
        "Is a directory": entry(2, "folder.jpg"),
        "Is not a plain file": entry(12, "pipe.jpg"),
        "leads out of the folder": entry(3, "../in.json"),
        "image '/etc/passwd' leads out": entry(4, "/etc/passwd"),
        "stands 0 times in it, and it names 1": entry(5, "sub/plain.png", "brown"),
        "stands 1 times in it, and it names 0": entry(6, None),
        "stands 1 times in it, and it names 2": entry(7, ["sub/plain.png", "sub/alpha.png"]),
        "not the user's": entry(8, "sub/plain.png", "brown", "<image>"),
        "</s> in a message of the user": entry(13, "sub/plain.png", "<image> </s>"),
        "stands for a part of an image": entry(9, "sub/plain.png", "<image> <s>"),
        "is no path": entry(10, [3]),  # type: ignore[list-item]
        "not a JSON object": 3,
        "none of messages": {"image": "sub/plain.png"},
    }
    reasons = [*odd, *(f"{name}: " for name in BAD)]
    entries += [*odd.values(), *(entry(100 + i, name) for i, name in enumerate(BAD))]  # type: ignore[list-item]
    (tmp_path / "in.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"in\.json: entry 41: .*missing\.jpg: No such file"):
        build(tmp_path, tokenizer, output="stopped")
    assert not (tmp_path / "stopped/manifest.json").exists()
    manifest = build(tmp_path, tokenizer, "--on-error", "quarantine")
    assert manifest.rejected == len(reasons) and verify(tmp_path / "data") == []
    lines = (tmp_path / "data/parts/part_00000.rejected.jsonl").read_text().splitlines()
    for line, reason, number in zip(lines, reasons, range(41, 99), strict=False):
        assert reason in json.loads(line)["reason"] and f"entry {number}" in line
    with pytest.raises(DataError, match=f"more than {len(reasons) - 1} bad"):
        more = ["--on-error", "quarantine", "--max-rejected", str(len(reasons) - 1)]
        build(tmp_path, tokenizer, *more, output="stopped")


@pytest.mark.parametrize("block", [2, row_blocks.BLOCK_ROWS])
def test_verify_finds_what_was_changed(
    block: int, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_ROWS", block)
    write_folder(tmp_path, 12)
    build(tmp_path, tokenizer)
    folder = tmp_path / "data"
    for name, at, said in (
        ("images_00000.tar", 600, "digest"),
        ("images.index", 3, "digest"),
        ("segment_000.images", 0, "digest"),
    ):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 64
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert any(name in fault and said in fault for fault in verify(folder)), said
        (folder / name).write_bytes(kept)
    path = folder / "segment_000.images"
    kept = path.read_bytes()
    sound = np.frombuffer(kept, "<i4").reshape(DatasetManifest.read(folder / "manifest.json").rows, -1)
    row = int(np.flatnonzero((sound >= 0).sum(axis=1) >= 2)[-1])
    assert row >= 2
    for numbers, said in (
        ([99, *sound[row, 1:]], "an image that there is not"),
        ([-1, *sound[row, 1:]], "an image behind a place without one"),
        ([sound[row, 0], *[-1] * (sound.shape[1] - 1)], "other than"),
    ):
        changed = sound.copy()
        changed[row] = numbers
        path.write_bytes(changed.tobytes())
        assert any(f"row {row}: {said}" in fault for fault in verify(folder)), said
    path.write_bytes(kept)
    assert verify(folder) == []


def test_verify_holds_a_block_of_rows_however_long_the_segment(tmp_path: Path, tokenizer: Path) -> None:
    write_folder(tmp_path, 8)
    build(tmp_path, tokenizer)
    manifest, rows, base = DatasetManifest.read(tmp_path / "data/manifest.json"), 200_000, tmp_path / "segment_000"
    record = dataclasses.replace(manifest.segments[0], rows=rows)
    np.full((rows, record.images_per_row), -1, "<i4").tofile(base.with_suffix(".images"))
    with base.with_suffix(".bin").open("wb") as ids:
        ids.truncate(2 * rows * ROW)  # 52 MB, none of them on the disk
    record.digests["images"] = digest_file(base.with_suffix(".images"))
    tracemalloc.start()
    try:
        assert list(row_faults(base, record, manifest)) == []
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_images_go_to_a_process_by_their_bytes(tmp_path: Path) -> None:
    sizes = [1, 40, 30, 30, 0, 200, 1, 1, *[1] * 20]
    for number, size in enumerate(sizes):
        with (tmp_path / str(number)).open("wb") as picture:
            picture.truncate(size << 20)
    paths = [*map(str, range(len(sizes))), "missing"]
    batches = list(parts.picture_batches(tmp_path, paths))
    assert [path for batch in batches for path in batch] == paths
    held = [sum(min(64, sizes[int(path)]) for path in batch if path != "missing") for batch in batches]
    assert max(held) <= 64 and max(map(len, batches)) == 16


def test_what_cannot_be_built_is_refused_first(tmp_path: Path, tokenizer: Path) -> None:
    write_folder(tmp_path, 8)
    for more, said in (
        (["--image-tokens", "130"], "fits into no row"),
        (["--placeholder", "<image>"], "none of its control tokens"),
        (["--placeholder", "</s>"], "ends a turn"),
        (["--placeholder", "<unk>"], "pads rows"),
        (["--images", str(tmp_path / "nowhere")], "no such folder"),
    ):
        with pytest.raises(DataError, match=said):
            build(tmp_path, tokenizer, *more)
    (tmp_path / "in.json").write_text(json.dumps([entry(1, None, "brown")]))
    with pytest.raises(DataError, match="no conversation with an image"):
        build(tmp_path, tokenizer)
    (tmp_path / "in.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="no JSON array"):
        build(tmp_path, tokenizer, output="other")
