"""`fetch` from a server on loopback: resumes, checks, refuses; what it brings, `index` takes."""

from __future__ import annotations

import hashlib
import json
import resource
from pathlib import Path

import pytest

from data_tools.files.errors import DataError
from data_tools.index.fetch import Fetcher
from tests.data_tools.conftest import build_amber
from tests.data_tools.index.conftest import Site

CONTENT = b"{" + (bytes(range(256)) * 5000)[1:]


@pytest.mark.parametrize("linked", [False, True])
def test_a_broken_transfer_goes_on_where_it_stopped(site: Site, tmp_path: Path, linked: bool) -> None:
    site.files["a.jsonl"], site.linked, site.cut_after = CONTENT, linked, [1000, 50_000]
    Fetcher(tmp_path, pause_s=0).fetch(f"{site.address}/a.jsonl", "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=1000-", "bytes=51000-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.jsonl"]
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["bytes"], record["checked"]) == (len(CONTENT), linked)
    Fetcher(tmp_path).fetch(f"{site.address}/a.jsonl", "a.jsonl")
    assert len(site.ranges) == 3  # not asked again


def test_a_file_that_changed_here_at_the_same_size_is_fetched_again(site: Site, tmp_path: Path) -> None:
    site.files["a.jsonl"] = CONTENT
    for content in (CONTENT, CONTENT, CONTENT[::-1]):
        (tmp_path / "a.jsonl").write_bytes(content)
        Fetcher(tmp_path).fetch(f"{site.address}/a.jsonl", "a.jsonl")
        assert (tmp_path / "a.jsonl").read_bytes() == CONTENT
    assert len(site.ranges) == 2


def test_a_file_that_changed_is_begun_anew(site: Site, tmp_path: Path) -> None:
    site.files["a"], site.cut_after = CONTENT, [70_000, 0]
    with pytest.raises(DataError, match="1 attempts failed, the last: the connection ended after 70000 of 1280000"):
        Fetcher(tmp_path, tries=1, pause_s=0).fetch(f"{site.address}/a", "a")
    assert not (tmp_path / "a").exists()
    site.files["a"] = CONTENT[::-1]
    Fetcher(tmp_path, pause_s=0).fetch(f"{site.address}/a", "a")
    assert (tmp_path / "a").read_bytes() == CONTENT[::-1]


def test_killed_before_the_check_it_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    site.files["a"] = CONTENT
    (tmp_path / "a.partial").write_bytes(CONTENT)
    (tmp_path / "a.tag").write_text("v")
    Fetcher(tmp_path, tries=1).fetch(f"{site.address}/a", "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert site.ranges == [f"bytes={len(CONTENT)}-"]


def test_killed_before_the_marker_it_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    site.files["a.jsonl"] = CONTENT
    (tmp_path / "a.jsonl").write_bytes(CONTENT)
    (tmp_path / "a.jsonl.tag").write_text("v")
    Fetcher(tmp_path, tries=1).fetch(f"{site.address}/a.jsonl", "a.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.jsonl"]
    assert site.ranges == [f"bytes={len(CONTENT)}-"]


def test_an_old_file_does_not_take_the_place_of_what_is_on_its_way(site: Site, tmp_path: Path) -> None:
    site.files["a.jsonl"] = CONTENT
    (tmp_path / "a.jsonl").write_bytes(OTHER)
    (tmp_path / "a.jsonl.partial").write_bytes(CONTENT[:1000])
    (tmp_path / "a.jsonl.tag").write_text("v-" + hashlib.sha256(CONTENT).hexdigest()[:8])
    Fetcher(tmp_path, tries=1).fetch(f"{site.address}/a.jsonl", "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == CONTENT
    assert site.ranges == ["bytes=1000-"]


def test_a_full_disk_names_the_file_and_the_next_run_goes_on(site: Site, tmp_path: Path) -> None:
    site.files["a.jsonl"] = CONTENT
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"a\.jsonl: cannot write: File too large"):
            Fetcher(tmp_path, tries=100, pause_s=100).fetch(f"{site.address}/a.jsonl", "a.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "a.jsonl").exists()
    Fetcher(tmp_path).fetch(f"{site.address}/a.jsonl", "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=600000-"]


OTHER = CONTENT[::-1]
TAG, SIZE = {"ETag": '"v"'}, {"Content-Length": str(len(CONTENT))}


@pytest.mark.parametrize(
    "second",
    [
        (206, {**TAG, "Content-Range": f"bytes 1000-{len(OTHER) - 1}/{len(OTHER)}"}, OTHER[1000:]),  # another beginning
        (206, {"ETag": '"w"', "Content-Range": f"bytes 5000-{len(OTHER) - 1}/{len(OTHER)}"}, OTHER[5000:]),
        (206, {"Content-Range": f"bytes 5000-{len(OTHER) - 1}/{len(OTHER)}"}, OTHER[5000:]),  # which version?
        (416, {"ETag": '"w"', "Content-Range": "bytes */5000", "Content-Length": "0"}, b""),
        (416, {**TAG, "Content-Range": "bytes */3000", "Content-Length": "0"}, b""),
        (200, {**TAG, **SIZE}, CONTENT),
        (503, {"Content-Length": "0"}, b""),
    ],
)
def test_what_a_server_sends_in_a_range_s_place_is_not_put_behind_the_beginning(
    site: Site, tmp_path: Path, second: tuple[int, dict[str, str], bytes]
) -> None:
    site.files["a"] = CONTENT
    site.answers = [(200, {**TAG, **SIZE}, CONTENT[:5000]), second]
    Fetcher(tmp_path, tries=4, pause_s=0).fetch(f"{site.address}/a", "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert site.ranges[:2] == [None, "bytes=5000-"]


def test_without_a_tag_a_file_goes_on_only_where_its_checksum_is_known(site: Site, tmp_path: Path) -> None:
    site.files["a"] = CONTENT
    rest = (206, {"Content-Range": f"bytes 5000-{len(CONTENT) - 1}/{len(CONTENT)}"}, CONTENT[5000:])
    for checksums, requests in (({"a": hashlib.sha256(CONTENT).hexdigest()}, 2), ({}, 3)):
        out = tmp_path / str(requests)
        out.mkdir()
        site.ranges.clear()
        site.answers = [(200, SIZE, CONTENT[:5000]), rest]
        Fetcher(out, checksums, tries=4, pause_s=0).fetch(f"{site.address}/a", "a")
        assert (out / "a").read_bytes() == CONTENT
        assert len(site.ranges) == requests


@pytest.mark.parametrize(
    "answer",
    [
        (206, {**TAG, "Content-Range": f"bytes 5-{len(OTHER) - 1}/{len(OTHER)}"}, OTHER[5:]),
        (302, {"Location": "http://[bad", "Content-Length": "0"}, b""),
        (200, {**TAG, "Content-Length": "\u00b2"}, CONTENT),
    ],
)
def test_answers_that_make_no_sense_are_one_error(
    site: Site, tmp_path: Path, answer: tuple[int, dict[str, str], bytes]
) -> None:
    site.files["a"] = CONTENT
    site.answers = [answer] * 2
    with pytest.raises(DataError):
        Fetcher(tmp_path, tries=2, pause_s=0).fetch(f"{site.address}/a", "a")
    assert not (tmp_path / "a").exists()


def test_wrong_bytes_are_refused(site: Site, tmp_path: Path) -> None:
    site.files["a"] = CONTENT
    fetcher = Fetcher(tmp_path, checksums={"a": "0" * 64})
    with pytest.raises(DataError, match=f"expected {len(CONTENT)} with 0000"):
        fetcher.fetch(f"{site.address}/a", "a")
    assert not list(tmp_path.glob("a")) + list(tmp_path.glob("*.partial"))


def test_a_missing_file_is_said_at_once(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the server answers 404"):
        Fetcher(tmp_path, tries=100, pause_s=100).fetch(f"{site.address}/none", "none")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--input", "http://[bad"), "http://[bad: not an address that begins with https://"),
        (("--input", "http://a b"), "http://a b/train_000.jsonl: not an address: "),
        (("--input", "/some/folder"), "/some/folder: not an address that begins with https://"),
        (("--input", "http://127.0.0.1:9/x", "--segment", "350-360"), "no segment 360: there are 360"),
    ],
)
def test_what_cannot_be_fetched_is_said_at_once(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    result = build_amber("fetch", *arguments, "--output", tmp_path / "amber", check=False)
    assert (result.returncode, says in result.stderr, "Traceback" in result.stderr) == (1, True, False)


def test_a_file_that_cannot_be_written_is_not_tried_again(site: Site, tmp_path: Path) -> None:
    site.files["a"] = CONTENT
    (tmp_path / "a.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        Fetcher(tmp_path, tries=100, pause_s=100).fetch(f"{site.address}/a", "a")


def test_what_is_fetched_can_be_indexed_and_what_changed_since_cannot(site: Site, corpus: Path, tmp_path: Path) -> None:
    for k in range(2):
        rows = [{"token_ids": [k, i, 1000], "source": "c4"} for i in range(20)]
        site.files[f"train_{k:03d}.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    site.files["t/tokenizer.json"] = (corpus / "tokenizer.json").read_bytes()
    names = ["train_000.jsonl", "train_001.jsonl"]
    listed = [*names, "t/tokenizer.json"]
    sums = "".join(f"{hashlib.sha256(site.files[name]).hexdigest()}  {name}\n" for name in listed)
    (tmp_path / "sums").write_text(sums)
    amber = tmp_path / "amber"
    build_amber(
        *("fetch", "--input", site.address, "--tokenizer", f"{site.address}/t/tokenizer.json", "--output", amber),
        *("--segment", "0-1", "--checksums", tmp_path / "sums"),
    )
    build_amber("index", "--input", amber, "--output", tmp_path / "out", "--row-length", 3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["vocab_size"], manifest["tokenizer"]["file"]) == (40, 1024, "tokenizer.json")
    path = amber / "train_001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"1000", b"1001"))
    result = build_amber("index", "--input", amber, "--output", tmp_path / "again", "--row-length", 3, check=False)
    assert result.returncode == 1
    assert f"{path}: its digest is" in result.stderr
