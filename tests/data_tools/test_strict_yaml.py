"""YAML that stands for more than it seems is refused before it costs anything; all else is read as PyYAML reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_tools.files.strict_yaml import MAX_VALUES, NotYaml, parse_yaml, read_yaml
from megatron_patch.recipe import RecipeError, load
from tests.data_tools.conftest import ROOT, build_amber


def levels(first: str, level: str, count: int) -> str:
    """`first` anchored as l0, then `count` lines of `level`, in which {0} is the level before."""
    return f"l0: &l0 {first}\n" + "".join(f"l{i}: &l{i} {level.format(f'*l{i - 1}')}\n" for i in range(1, count + 1))


FILES = [*(ROOT / "recipes").glob("*.yaml"), ROOT / "data_tools/amber.yaml"]
BOMBS = {
    "aliases": (levels("[x, x]", "[{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}]", 10), "stands for more than 5000"),
    "merge keys": (levels("{a: 1}", "{{<<: [{0}, {0}, {0}, {0}]}}", 10), "stands for more than 5000 values"),
    "keys of merges": (levels("{a: 1}", "{{<<: {0}, b: {0}}}", 20), "stands for more than 5000 values"),
    "aliases as keys": ("a: &a k\n? *a\n: 1\n? *a\n: 2\n", r"written twice: \['k'\]"),
    "two merges": ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", "written twice: \\['<<'\\]"),
    "itself": ("a: &a [*a]\n", "an alias of a value that holds it"),
    "itself by merge": ("a: &a {b: 1, <<: *a}\n", "an alias of a value that holds it"),
    "40,000 keys": ("".join(f"key_{i}: {i}\n" for i in range(40_000)), "longer than 262144 characters"),
    "10,000 keys": ("".join(f"key_{i}: {i}\n" for i in range(10_000)), "stands for more than 5000 values"),
    "2,000 equal keys": ("k: 1\n" * 2_000, r"written twice: \['k'\]"),
    "true is 1": ("{1: a, true: b}", "written twice: "),
    "brackets": ("[" * 100_000, "nested deeper than 50"),
    "dashes": ("- " * 100_000, "nested deeper than 50"),
    "base 60": ("a: 1" + ":1" * 100_000, "a number of more than 1000 characters"),
    "digits": ("a: " + "9" * 200_000, "a number of more than 1000 characters"),
    "length": ("a: " + "x" * (1 << 18), "longer than 262144 characters"),
    "a list as a key": ("{[a]: 1}", "a list or a mapping cannot be a key"),
    "a tag that runs code": ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "a tag that does not fit": ("a: !!timestamp x", "'NoneType'"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_no_settings_file_needs_is_refused(name: str) -> None:
    text, reason = BOMBS[name]
    with pytest.raises(NotYaml, match=reason):
        parse_yaml(text)


def test_the_limit_counts_what_is_written_out() -> None:
    half = MAX_VALUES // 2 - 4
    assert len(parse_yaml("[" + "x, " * (MAX_VALUES - 1) + "]")) == MAX_VALUES - 1
    value = parse_yaml(f"a: &a [{'x, ' * (half - 1)}]\nb: *a\n")
    assert len(value["b"]) == half - 1
    with pytest.raises(NotYaml, match="line 2, column 12"):
        parse_yaml(f"a: &a [{'x, ' * (half - 1)}]\nb: [*a, x, *a]\n")


@pytest.mark.parametrize(
    "file", [*(ROOT / "recipes").glob("*.yaml"), ROOT / "data_tools/amber.yaml"], ids=lambda path: path.name
)
def test_files_of_this_repository_are_read_as_pyyaml_reads_them(file: Path) -> None:
    assert read_yaml(file) == yaml.safe_load(file.read_text())


@pytest.mark.parametrize("name", ["aliases", "merge keys", "40,000 keys"])
def test_recipes_and_builds_are_read_so(name: str, tmp_path: Path) -> None:
    text, reason = BOMBS[name]
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"x\.yaml: not valid YAML: {reason}"):
        load(path)
    if name == "aliases":
        result = build_amber("run", "--config", path, "--input", tmp_path, "--output", tmp_path / "out", check=False)
        assert result.returncode == 1
        assert result.stderr.startswith(f"error: {path}: not YAML: stands for more than 5000 values")
        with path.open("ab") as stream:
            stream.truncate(1 << 40)  # sparse: a terabyte of zeros
        with pytest.raises(NotYaml, match="longer than"):
            read_yaml(path)


def test_an_override_is_read_so() -> None:
    with pytest.raises(RecipeError, match=r"override .*: the value is not YAML \(nested deeper than 50"):
        load("recipes/demo.yaml", ["seed=" + "[" * 5000])
