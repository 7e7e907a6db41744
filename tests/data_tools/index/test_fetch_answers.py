"""`fetch` from servers that are not the hub (busy, dropping, packing, signing in), and lists of checksums."""

from __future__ import annotations

import email.utils
import gzip
import hashlib
import json
import re
import time
from pathlib import Path

import pytest

from data_tools import build_amber
from data_tools.files.errors import DataError
from data_tools.index import fetch as fetch_module
from data_tools.index.checksums import read_checksums
from data_tools.index.fetch import Fetcher
from tests.data_tools.index.conftest import Site

BODY = b"".join(json.dumps({"token_ids": [1, i, 5], "source": "c4"}).encode() + b"\n" for i in range(200))
SUM = hashlib.sha256(BODY).hexdigest()
SIZE = {"Content-Length": str(len(BODY))}
NAME = "train_000.jsonl"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(fetch_module.time, "sleep", slept.append)
    return slept


def fetch(site: Site, out: Path, *more: object) -> int:
    arguments = ("fetch", "--input", site.address, "--output", out, "--segment", 0, *more)
    return build_amber.run(build_amber.build_parser().parse_args(list(map(str, arguments))))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, {"Content-Encoding": "gzip"}, gzip.compress(BODY)), "sends it packed (gzip)"),
        ((200, {"Content-Encoding": "zstd", **SIZE}, BODY), "sends it packed (zstd)"),
        ((200, {"Transfer-Encoding": "gzip, chunked"}, BODY), "sends it packed (gzip, chunked)"),
        ((200, {"Content-Type": "text/html; charset=utf-8", **SIZE}, BODY), "sends text/html, not the file"),
        ((200, {"Content-Type": "application/xml", **SIZE}, BODY), "sends application/xml, not the file"),
        ((200, {"Content-Type": "multipart/byteranges; boundary=x", **SIZE}, BODY), "sends multipart/byteranges"),
        ((200, {"Content-Length": "21"}, b"<html>sign in</html>\n"), "begins with b'<html>sign in"),
        ((200, {"Content-Length": "20"}, gzip.compress(b"")), "which is no JSON object"),
        (
            (200, {"Content-Type": "application/json", "Content-Length": "17"}, b'{"error":"quota"}'),
            "no row of a segment",
        ),
        ((200, {"Content-Length": "14"}, b'{"error":"x"}\n'), "no row of a segment"),
        ((200, {"Content-Length": "0"}, b""), "sends an empty file"),
        ((200, {"Transfer-Encoding": "chunked"}, b"0\r\n\r\n"), "sends an empty file"),
        ((204, {}, b""), "answers 204"),
        ((200, {}, BODY[:50]), "does not say how long it is"),
        ((200, {}, BODY), "does not say how long it is"),
    ],
)
def test_an_answer_that_is_not_the_file_is_refused_at_once(
    answer: tuple[int, dict[str, str], bytes], says: str, site: Site, tmp_path: Path, pauses: list[float]
) -> None:
    site.files[NAME], site.answers = BODY, [answer]
    with pytest.raises(DataError, match=re.escape(says)) as error:
        fetch(site, tmp_path)
    assert error.value.file == f"{site.address}/{NAME}"
    assert not (tmp_path / NAME).exists() and not pauses
    fetch(site, tmp_path)  # the server has been mended
    assert (tmp_path / NAME).read_bytes() == BODY


def test_a_body_of_unknown_length_is_whole_where_its_checksum_says_so(site: Site, tmp_path: Path) -> None:
    site.files[NAME] = BODY
    chunked = (200, {"Transfer-Encoding": "chunked"}, b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
    for number, (answer, checksums) in enumerate((((200, {}, BODY), {NAME: SUM}), (chunked, {}))):
        site.answers = [answer]
        (tmp_path / str(number)).mkdir()
        Fetcher(tmp_path / str(number), checksums, tries=1).fetch(f"{site.address}/{NAME}", NAME)
        assert (tmp_path / str(number) / NAME).read_bytes() == BODY
    site.answers = [(200, {}, BODY[:-50])]
    with pytest.raises(DataError, match="expected None with"):
        Fetcher(tmp_path, {NAME: SUM}, tries=1).fetch(f"{site.address}/{NAME}", NAME)
    site.answers = [(200, {"Transfer-Encoding": "chunked"}, b"%x\r\n%s" % (len(BODY), BODY[:90]))] * 2
    with pytest.raises(DataError, match="attempts failed"):
        Fetcher(tmp_path, tries=1, pause_s=0).fetch(f"{site.address}/{NAME}", NAME)


def test_what_a_server_asks_to_wait_is_waited(site: Site, tmp_path: Path, pauses: list[float]) -> None:
    site.files[NAME] = BODY
    date = email.utils.formatdate(time.time() + 120, usegmt=True)
    waits = ["40", date, "0", "soon", "-3"]
    site.answers = [(429 if i % 2 else 503, {"Retry-After": wait}, b"") for i, wait in enumerate(waits)]
    Fetcher(tmp_path, tries=3, pause_s=1).fetch(f"{site.address}/{NAME}", NAME)
    assert pauses[0] == 40 and 100 < pauses[1] <= 120
    assert pauses[2:] == [1, 1, 2]  # never without a pause; what makes no sense is an attempt
    assert (tmp_path / NAME).read_bytes() == BODY


@pytest.mark.parametrize(("wait", "count"), [("7200", 0), ("900", 4), ("1", 3600)])
def test_a_server_that_asks_for_ever_is_left(
    wait: str, count: int, site: Site, tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "LONGEST_WAIT_S", 3600.0 if count < 3600 else 5.0)
    site.files[NAME] = BODY
    site.answers = [(429, {"Retry-After": wait}, b"")] * 20
    with pytest.raises(DataError, match=f"asks to wait {wait} s more.*429"):
        Fetcher(tmp_path).fetch(f"{site.address}/{NAME}", NAME)
    assert len(pauses) == min(count, 5)


def test_progress_refills_the_attempts_and_standing_still_does_not(
    site: Site, tmp_path: Path, pauses: list[float]
) -> None:
    site.files[NAME], site.cut_after = BODY, [500, 0, 500, 0, 500, 0, 500, 0, 500]
    Fetcher(tmp_path, tries=2, pause_s=1).fetch(f"{site.address}/{NAME}", NAME)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert set(pauses) == {1}
    (tmp_path / "again").mkdir()
    site.cut_after = [500, 0, 0]
    with pytest.raises(DataError, match="2 attempts failed, the last: the connection ended after 500"):
        Fetcher(tmp_path / "again", tries=2).fetch(f"{site.address}/{NAME}", NAME)
    site.answers = [(200, SIZE, BODY[:400])] * 3  # no ranges, no tag: it begins anew and comes no further
    with pytest.raises(DataError, match="2 attempts failed"):
        Fetcher(tmp_path / "again", tries=2).fetch(f"{site.address}/{NAME}", NAME)


@pytest.mark.parametrize(
    "text",
    [
        f"{SUM}  {NAME}\n",
        f"{SUM} *a/{NAME}\r\n\r\n",
        f"\ufeff# made on node 7\n{SUM.upper()}  ./{NAME}\n\n",
        f"SHA256 ({NAME}) = {SUM}\n",
        f"SHA2-256({NAME})= {SUM}\n",
        f"\\{SUM}  {NAME}\n{'0' * 64}  another.jsonl\n",
        f"{SUM}\t{NAME}\n{SUM}  b/{NAME}",
    ],
)
def test_every_usual_form_of_a_list_binds(text: str, site: Site, tmp_path: Path) -> None:
    (tmp_path / "sums").write_text(text, encoding="utf-8", newline="")
    site.files[NAME] = BODY
    fetch(site, tmp_path / "good", "--checksums", tmp_path / "sums")
    record = json.loads((tmp_path / "good/train_000.json").read_text())
    assert (record["checked"], record["checked_by"]) == (True, "checksums")
    site.files[NAME] = BODY.replace(b"199", b"198")
    with pytest.raises(DataError, match=f"expected {len(BODY)} with {SUM}"):
        fetch(site, tmp_path / "bad", "--checksums", tmp_path / "sums")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lists nothing"),
        ("\n# only this\n", "lists nothing"),
        (f"{SUM}\n", "line 1: no checksum and name"),
        (f"{SUM[:40]}  {NAME}\n", "line 1: a checksum of another kind"),
        (f"{SUM}  {NAME}\nMD5 ({NAME}) = {SUM[:32]}\n", "line 2: a checksum of another kind"),
        (f"{SUM}  {NAME}\n{'0' * 64}  b/{NAME}\n", "line 2: train_000.jsonl has two checksums"),
        (f'{{"{NAME}": "{SUM}"}}', "line 1: no checksum and name"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "sums").write_text(text)
    with pytest.raises(DataError, match=says):
        read_checksums(tmp_path / "sums")
    (tmp_path / f"{NAME}.sha256").write_text(SUM + "\n")
    assert read_checksums(tmp_path / f"{NAME}.sha256") == {NAME: SUM}


def test_a_list_binds_what_an_earlier_fetch_brought_and_what_it_does_not_name(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.files = {NAME: BODY, "t/tokenizer.json": b"{}"}
    sums, out = tmp_path / "sums", tmp_path / "out"
    tokenizer = ("--tokenizer", f"{site.address}/t/tokenizer.json")
    fetch(site, out, *tokenizer)
    said = "no checksum vouches for 2 of the files (--checksums): "
    assert said + "tokenizer.json, train_000.jsonl\n" in capsys.readouterr().out
    requests = len(site.ranges)
    sums.write_text(f"{SUM}  {NAME}\n")
    with pytest.raises(DataError, match=r"tokenizer\.json: is not in the list of --checksums"):
        fetch(site, out, *tokenizer, "--checksums", sums)
    fetch(site, out, *tokenizer, "--checksums", sums, "--allow-unlisted")
    assert said.replace("2", "1") + "tokenizer.json\n" in capsys.readouterr().out
    records = [json.loads((out / f"{name}.json").read_text()) for name in ("train_000", "tokenizer.json.fetched")]
    assert [(record["checked"], record["checked_by"]) for record in records] == [(True, "checksums"), (False, None)]
    sums.write_text(f"{'0' * 64}  {NAME}\n")
    with pytest.raises(DataError, match=f"from an earlier fetch with SHA-256 {SUM}, --checksums says 0000"):
        fetch(site, out, "--checksums", sums)
    sums.write_text(f"{SUM}  train_0.jsonl\n")
    with pytest.raises(DataError, match=r"train_000\.jsonl: is not in the list"):
        fetch(site, out, "--checksums", sums)
    assert len(site.ranges) == requests  # nothing was asked for again
    site.linked = True
    fetch(site, tmp_path / "hub")
    assert json.loads((tmp_path / "hub/train_000.json").read_text())["checked_by"] == "server"
    assert "vouches" not in capsys.readouterr().out


def test_a_tag_that_looks_like_a_checksum_is_none(site: Site, tmp_path: Path) -> None:
    site.files[NAME] = BODY
    site.answers = [(200, {**SIZE, "ETag": f'"{"0" * 64}"'}, BODY)]
    fetch(site, tmp_path)
    assert json.loads((tmp_path / "train_000.json").read_text())["checked_by"] is None
