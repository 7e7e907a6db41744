"""A data set's sources are its own list: Amber's seven where none is named, any others from one YAML file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import yaml

from data_tools import build_amber
from data_tools.dataset.format import AMBER_SOURCES, DatasetManifest, SegmentManifest, segment_name
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import canonical_json, sealed
from data_tools.index.index_segments import index, plan_dataset
from data_tools.index.verify import stats_table, verify
from megatron_patch.data.segments import open_segments
from tests.data_tools.small_segments import ROW_LENGTH, write_segments

ROWS = 5  # ids a row


def command(*arguments: object) -> int:
    return build_amber.run(build_amber.build_parser().parse_args(list(map(str, arguments))))


def write_config(path: Path, names: list[str], **more: object) -> Path:
    config = {"tokenizer": "tokenizer.json", "row_length": ROWS, "num_segments": 2, **more}
    path.write_text(yaml.safe_dump({**config, "sources": {n: f"text_{n}" for n in names}}, sort_keys=False))
    return path


def write_text(folder: Path, names: list[str], tokenizer: Path) -> dict[str, list[int]]:
    """A small text of each source; returns their ids."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    reference = tokenizers.Tokenizer.from_file(str(tokenizer))
    ids = {}
    for i, name in enumerate(names):
        texts = [f"{name} says {i} and {j}" for j in range(6 + i)]
        (folder / f"text_{name}").mkdir()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"text_{name}" / "x.jsonl").write_text(lines)
        eos = reference.token_to_id("</s>")
        ids[name] = [i for text in texts for i in [*reference.encode(text, add_special_tokens=False).ids, eos]]
    return ids


def expected_rows(ids: dict[str, list[int]], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and codes, distributed over two segments: [segment, row, id] and [segment, row]."""
    rows = [(ids[n][at : at + ROWS], i) for i, n in enumerate(names) for at in range(0, len(ids[n]) - ROWS + 1, ROWS)]
    rows = rows[: len(rows) // 2 * 2]
    return np.array([[row for row, _ in rows[k::2]] for k in (0, 1)]), np.array(
        [[c for _, c in rows[k::2]] for k in (0, 1)]
    )


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        [*AMBER_SOURCES, "proof-pile_2"],  # an eighth
        ["math", "zh", "math2"],  # three others, one the beginning of another, in no order of the alphabet
        ["wikipedia", "news.de"],  # one of Amber's and another: the file's order, not Table 2's
    ],
)
def test_other_sources_are_an_edit_of_one_file(
    names: list[str], direct: bool, small_corpus: Path, tmp_path: Path
) -> None:
    ids = write_text(tmp_path / "raw", names, small_corpus / "tokenizer.json")
    config = write_config(tmp_path / "mix.yaml", names, direct=direct)
    command("run", "--config", config, "--input", tmp_path / "raw", "--output", tmp_path / "out", "--workers", 1)
    manifest = DatasetManifest.read(tmp_path / "out/indexed/manifest.json")
    assert manifest.sources == tuple(names)
    assert all(segment.sources == tuple(names) for segment in manifest.segments)
    rows, codes = expected_rows(ids, names)
    segments = open_segments(tmp_path / "out/indexed", row_length=ROWS, vocab_size=32000)
    for k in (0, 1):
        every = np.arange(segments.rows_per_segment)
        np.testing.assert_array_equal(segments.read(k, every), rows[k])
        np.testing.assert_array_equal(segments.sources(k, every), codes[k])
    segments.close()
    table = stats_table(tmp_path / "out/indexed").splitlines()
    assert [line.split()[0] for line in table[1:-2]] == names
    assert table[len(names)].split()[-1] == "-"  # not in Table 2


def test_the_stages_one_by_one_take_the_same_file(
    small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["zh", "math", "code"]
    write_text(tmp_path / "raw", names, small_corpus / "tokenizer.json")
    config = ("--config", write_config(tmp_path / "mix.yaml", names))
    raw, rows, out = tmp_path / "raw", tmp_path / "rows", tmp_path / "out"
    command("run", *config, "--input", raw, "--output", tmp_path / "whole", "--workers", 1)
    options = ("--tokenizer", raw / "tokenizer.json", "--row-length", ROWS, "--workers", 1)
    one = ("tokenize", "--input", raw / "text_zh", "--source", "zh", "--output", rows, *options)
    with pytest.raises(DataError, match=r"amber\.yaml: sources: lists no source 'zh'"):
        command(*one)
    command(*one, *config)
    mix = ("mix", "--input", rows, "--num-segments", 2)
    with pytest.raises(DataError, match=r"rows/zh: no source of this mix"):
        command(*mix, "--output", out, "--direct")
    with pytest.raises(DataError, match=r"lists math, code, which has no rows here"):
        command(*mix, "--output", out, "--direct", *config)
    command("tokenize", "--input", raw, "--output", rows, *options, *config)
    command(*mix, "--output", out, "--direct", *config)
    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole/indexed/manifest.json").read_bytes()
    command(*mix, "--output", tmp_path / "jsonl", *config)
    with pytest.raises(DataError, match=r"mix\.json: the sources are zh, math, code, not arxiv, "):
        command("index", "--input", tmp_path / "jsonl", "--output", tmp_path / "x", "--config", build_amber.AMBER)
    command("index", "--input", tmp_path / "jsonl", "--output", tmp_path / "indexed")  # mix.json says which
    for suffix in ("bin", "src", "idx"):
        name = f"{segment_name(1)}.{suffix}"
        assert (tmp_path / "indexed" / name).read_bytes() == (out / name).read_bytes()
    with pytest.raises(DataError, match="no such folder"):
        command("tokenize", "--input", tmp_path / "jsonl", "--output", rows, *options, *config)


def test_a_selection_of_ambers_keeps_ambers_codes(small_corpus: Path, tmp_path: Path) -> None:
    names = ["wikipedia", "book"]  # not Table 2's order
    ids = write_text(tmp_path / "raw", names, small_corpus / "tokenizer.json")
    config = write_config(tmp_path / "mix.yaml", names)
    command("run", "--config", config, "--input", tmp_path / "raw", "--output", tmp_path / "out", "--workers", 1)
    manifest = DatasetManifest.read(tmp_path / "out/indexed/manifest.json")
    assert manifest.sources == AMBER_SOURCES
    rows, codes = expected_rows(ids, ["book", "wikipedia"])
    stored = np.fromfile(tmp_path / "out/indexed/segment_000.bin", "<u2").reshape(-1, ROWS)
    np.testing.assert_array_equal(stored, rows[0])
    stored_codes = np.fromfile(tmp_path / "out/indexed/segment_000.src", np.uint8)
    np.testing.assert_array_equal(stored_codes, np.where(codes[0] == 0, 1, 6))


def test_manifests_of_ambers_sources_are_the_bytes_of_before(tmp_path: Path) -> None:
    amber = write_segments(tmp_path)
    manifest = index(amber, tmp_path / "out", plan_dataset(amber, ROW_LENGTH, None), ErrorPolicy())
    # What 8f56453 wrote, when no segment's manifest had a list: the data set that a checkpoint names is the same.
    assert manifest is not None
    assert manifest.digest == "fadc48862cb3b15413a84ae9cf38ac995b91f3090f5426c1f8c40fed330e9bfd"
    assert "sources" not in json.loads((tmp_path / "out/segment_000.json").read_text())


def test_lists_of_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    amber = write_segments(tmp_path)
    plan = plan_dataset(amber, ROW_LENGTH, None)
    out = tmp_path / "out"
    index(amber, out, plan, ErrorPolicy(), range(0, 1))
    other = plan_dataset(amber, ROW_LENGTH, None, sources=(*AMBER_SOURCES, "zh"))
    with pytest.raises(DataError, match=r"segment_000 was built with the sources arxiv.*, not arxiv.*, zh"):
        index(amber, out, other, ErrorPolicy())
    index(amber, out, plan, ErrorPolicy())
    path = out / "manifest.json"
    good = json.loads(path.read_text())
    for names, says in (
        ([*AMBER_SOURCES, "zh"], "was built with the sources"),
        (list(AMBER_SOURCES[::-1]), "was built with the sources"),
        ([*AMBER_SOURCES, "c4"], "'c4' is no source's name, or stands twice"),
        ([*AMBER_SOURCES[:6], 'a"b'], "is no source's name"),
        ([*AMBER_SOURCES[:6], 7], "7 is no source's name"),
        ([], "not a list of 1 to 256 sources"),
        ("arxiv", "not a list of 1 to 256 sources"),
        ([f"s{i}" for i in range(257)], "not a list of 1 to 256 sources"),
    ):
        path.write_bytes(canonical_json(sealed({**good, "sources": names})))
        with pytest.raises(DataError, match=says):
            DatasetManifest.read(path)
    own = out / "segment_001.json"
    own.write_bytes(canonical_json({**json.loads(own.read_text()), "sources": ["zh"]}))
    with pytest.raises(DataError, match="do not add up to"):
        SegmentManifest.read(own)
    path.write_bytes(canonical_json(good))
    assert "segment_001.json" in verify(out)[0]
