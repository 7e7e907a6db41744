"""`run`: everything from one YAML file; what does not fit is refused before work starts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_tools.build_config import BuildConfig, read_config
from data_tools.dataset.format import AMBER_SOURCES, TABLE_2_BILLION_TOKENS, DatasetManifest
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.run_all import run_all
from tests.data_tools.conftest import ROOT, build_amber


def test_amber_yaml_is_the_papers_mix() -> None:
    config = read_config(ROOT / "data_tools" / "amber.yaml")
    assert tuple(config.sources) == AMBER_SOURCES
    assert (config.row_length, config.num_segments, config.held_out_per_source) == (2049, 360, 0)
    assert round(sum(TABLE_2_BILLION_TOKENS.values()), 1) == 1259.1


@pytest.mark.parametrize("direct", [True, False])
def test_one_file_builds_it_all(small_corpus: Path, tmp_path: Path, direct: bool) -> None:
    config = {
        "tokenizer": "tokenizer.model",
        "row_length": 65,
        "num_segments": 4,
        "held_out_per_source": 2,
        "direct": direct,
        "sources": {name: name for name in ("wikipedia", "stackexchange", "starcoderdata")},
    }
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(config))
    arguments = ("run", "--config", tmp_path / "build.yaml", "--input", small_corpus, "--output", tmp_path / "out")
    result = build_amber(*arguments, "--workers", 1)
    assert "4 segments of" in result.stdout
    manifest = (tmp_path / "out" / "indexed" / "manifest.json").read_bytes()
    build_amber(*arguments, "--workers", 2)
    assert (tmp_path / "out" / "indexed" / "manifest.json").read_bytes() == manifest
    table = build_amber("stats", "--input", tmp_path / "out" / "indexed").stdout
    assert "held out: 6 rows" in table


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": 3}, "rows: Extra inputs are not permitted"),
        ({"num_segments": 0}, "num_segments: Input should be greater than or equal to 1"),
        ({"sources": {"a/b": "x"}}, "'a/b' is no source's name"),
        ({"sources": {"c4": "none"}}, "none: c4: not there"),
        ({"tokenizer": "none.model"}, "none.model: tokenizer: not there"),
        ({"num_segments": True}, "num_segments: Input should be a valid integer"),
        ({"sources": ["wikipedia"]}, "sources: Input should be a valid dictionary"),
        ({"sources": {"wikipedia": "wikipedia", "c4": "stackexchange/../wikipedia"}}, "wikipedia: lies in "),
        ({"sources": {"wikipedia": "wikipedia", "c4": "."}}, "which is c4"),
    ],
)
def test_what_does_not_fit_is_refused(small_corpus: Path, tmp_path: Path, change: dict, says: str) -> None:
    config = {"tokenizer": "tokenizer.model", "sources": {"wikipedia": "wikipedia"}, **change}
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(config))
    result = build_amber(
        *("run", "--config", tmp_path / "build.yaml", "--input", small_corpus, "--output", tmp_path / "out"),
        check=False,
    )
    assert result.returncode == 1
    assert says in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"tokenizer: a\nsources: {c4: x, c4: y}\n", "written twice: ['c4']"),
        (b"[" * 5000, "not YAML: nested deeper than 50"),
        (b"\xff\xfe", "not YAML: 'utf-8' codec can't decode"),
        (b"seed: 2024-99-99", "not YAML: month must be in 1..12"),
        (b"", "Input should be a valid dictionary"),
    ],
)
def test_what_is_no_configuration_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(says)) as error:
        read_config(path)
    assert error.value.file == str(path)


def test_rows_of_a_source_that_the_configuration_does_not_name_are_not_mixed_in(
    small_corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows" / "book").mkdir(parents=True)  # an earlier run's
    sources = {"wikipedia": Path("wikipedia")}
    config = BuildConfig(tokenizer=Path("tokenizer.model"), sources=sources, row_length=65, num_segments=2)
    with pytest.raises(DataError, match="rows/book: no source of this configuration"):
        run_all(config, small_corpus, tmp_path, workers=1, policy=ErrorPolicy())
    (tmp_path / "rows" / "book").rmdir()
    assert run_all(config, small_corpus, tmp_path, workers=1, policy=ErrorPolicy()).num_segments == 2


def test_rows_damaged_since_they_were_tokenised_are_not_mixed_in(small_corpus: Path, tmp_path: Path) -> None:
    config = BuildConfig(
        tokenizer=Path("tokenizer.model"), sources={"wikipedia": Path("wikipedia")}, row_length=65, num_segments=2
    )

    def run() -> DatasetManifest:
        return run_all(config, small_corpus, tmp_path, workers=1, policy=ErrorPolicy())

    undisturbed = run()
    shutil.rmtree(tmp_path / "indexed")
    part = tmp_path / "rows/wikipedia/part_00000.tokens"
    ids = bytearray(part.read_bytes())
    ids[len(ids) // 2] ^= 1  # an id that the vocabulary has too
    part.write_bytes(ids)
    with pytest.raises(DataError, match=r"(?s)part_00000\.tokens: damaged.*remove .*part_00000\.json"):
        run()
    assert not list((tmp_path / "indexed").glob("segment_*"))
    part.with_suffix(".json").unlink()
    assert run() == undisturbed


@pytest.mark.parametrize("command", ["tokenize", "mix", "index", "merge", "verify", "stats", "fetch", "run"])
def test_help_shows_an_example(command: str) -> None:
    text = build_amber(command, "--help").stdout
    assert f"example:\n  python data_tools/build_amber.py {command} --" in text


@pytest.mark.parametrize("tool", ["build_amber.py tokenize", "build_chat.py build", "build_vision.py build"])
def test_a_variable_that_is_not_set_is_not_the_current_folder(tool: str, tmp_path: Path) -> None:
    name, command = tool.split()
    words = [sys.executable, str(ROOT / "data_tools" / name), command, "--input", "raw", "--output", ""]
    done = subprocess.run([*words, "--tokenizer", "t.json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "error: --output is empty (a variable that is not set?)" in done.stderr
    assert not list(tmp_path.iterdir())


def test_errors_travel_between_processes() -> None:
    import pickle

    error = DataError("bad", file="a", place="line 3", remedy="mend it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a: line 3: bad\n  remedy: mend it"
