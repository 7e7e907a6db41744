"""Text from Debian packages: what is stripped, what is left out, and on which side a document stands."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from data_tools import debian_corpus
from data_tools.debian_corpus import Known, Manual, dictionary_entries, manual_texts, page_text, write_source
from data_tools.files.errors import DataError

PAGE = b"""<html><head><title>No</title></head><body><div class="navheader"><div>Prev</div><p>Next</p></div>
<h1>Index &amp; rows</h1><p>One <b>bold</b> word.</p><script>var no = 1;</script><pre>  SELECT 1;
  SELECT 2;</pre><ul><li>a<li>b</ul></body></html>"""


def test_a_page_is_its_text_without_what_every_page_repeats() -> None:
    (text,) = page_text(PAGE)
    assert [line for line in text.splitlines() if line.strip()] == [
        *("Index & rows", "One bold word.", "  SELECT 1;", "  SELECT 2;", "a", "b"),
    ]


def test_entries_begin_at_lines_that_are_not_indented() -> None:
    entries = ["Abbey \\Ab\\, n.\n   A house.\n\n   Another sense.", "Abbot \\Ab\\, n.\n   Its head."]
    assert dictionary_entries(gzip.compress("\n\n".join(entries).encode())) == entries


def test_documents_of_a_package(tmp_path: Path) -> None:
    """Built and read by Debian's own tool."""
    files = {"b.rst.gz": gzip.compress(b"second"), "a.rst.gz": gzip.compress(b"first"), "c.png": b"no text"}
    folder = tmp_path / "tree" / "usr" / "share" / "doc" / "manual"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (tmp_path / "tree" / "DEBIAN").mkdir()
    control = "Package: manual\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: none\n"
    (tmp_path / "tree" / "DEBIAN" / "control").write_text(control)
    subprocess.run(["dpkg-deb", "--build", "tree", "manual_1_all.deb"], cwd=tmp_path, check=True, capture_output=True)
    manual = Manual("manual", r"\./usr/share/doc/manual/.*\.rst\.gz", debian_corpus._packed)
    assert list(manual_texts(tmp_path, manual)) == ["first", "second"]
    with pytest.raises(DataError, match="no documents named"):
        list(manual_texts(tmp_path, manual._replace(files=r"\./usr/share/info/.*")))
    with pytest.raises(DataError, match="no package other"):
        list(manual_texts(tmp_path, manual._replace(package="other")))


def test_no_document_twice_and_each_on_one_side(tmp_path: Path) -> None:
    line = "A line that is long enough to be told from all the others, number "
    texts = [f"{line}{i}\n{line}{i}.5\n" for i in range(400)]
    copies = [f"{line}3\n{line}3.5\nA third line, which no document before has had in it, as far as is known.\n"]
    halves = [f"{line}4\nAnother line that stood nowhere else before, of forty characters and more.\n", " \n"]
    kept = write_source("x", [*texts, *copies, *halves], tmp_path, Known())
    sides = {
        side: [json.loads(row)["text"] for row in (tmp_path / side / "x" / "x.jsonl").read_text().splitlines()]
        for side in ("train", "held_out")
    }
    assert kept == sides["train"]
    assert sorted(sides["train"] + sides["held_out"]) == sorted([*texts, halves[0]])
    for side, documents in sides.items():
        for text in documents:
            number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            assert (number % 50 == 0) == (side == "held_out")
