"""`report --compare --devices`: what `device` wrote, beside the paper's Table 6, as a table and as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_patch.__main__ import main
from megatron_patch.devices.table import Measured, as_csv

Q4 = Measured(
    recipe="mobillama_05b", form="out/q4_0.gguf", runtime="llama.cpp (xllamacpp 1)", threads=2, file_bytes=710_750_208,
    bits=4.507, resident_bytes=1_433_000_000, load_seconds=1.0, first_seconds=0.1, tokens_per_second=19.125,
    cpu_seconds=0.1, joules=2.5, bandwidth=1.4e10, roofline=0.9, same_tokens=0.9, worst=0.2, loss=3.0,
    checkpoint_loss=2.9,
)  # fmt: skip
COMPARE = ["report", "--compare", "recipes/mobillama_05b.yaml"]


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "laptop.csv").write_text(as_csv([Q4, replace(Q4, recipe="large_base", threads=1, joules=None)]))
    (tmp_path / "phone.csv").write_text(as_csv([replace(Q4, tokens_per_second=7.25)]))
    files = ["--devices", str(tmp_path / "laptop.csv"), str(tmp_path / "phone.csv")]
    assert main([*COMPARE, *files, "--output", str(tmp_path / "figure_1.svg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| MobiLlama | paper | RTX2080Ti, bf16 | 63.38 | 3,046 | - | 8.19 |" in lines
    ours = "| mobillama_05b | laptop.csv: q4_0.gguf | llama.cpp (xllamacpp 1), 2 thread(s) | 19.12 | 1,433 | 2.5 | - |"
    assert ours in lines
    assert ours.replace("mobillama_05b", "large_base").replace("2 thread", "1 thread").replace("2.5", "-") in lines
    assert ours.replace("laptop", "phone").replace("19.12", "7.25") in lines
    words = (tmp_path / "figure_1.svg").read_text()
    for title in (
        "GPU hours", "Accuracy", "Tokens/s on the device", "Memory on the device (MB)", "J a token", "19.12", "7.25",
        "mAh for 1,000 tokens", "MobiLlama, Snapdragon-685, 4 bits (GGUF)", "large_base, laptop.csv: q4_0.gguf",
    ):  # fmt: skip
        assert f"<!-- {title} -->" in words, title


def test_what_is_no_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "devices.csv"
    for content, words in (
        ("", "no table of `device --csv` (its columns are not recipe, form"),
        ("a,b\n1,2\n", "its columns are not recipe, form"),
        (as_csv([Q4]).replace("19.125", "fast"), "could not convert string to float: 'fast'"),
        (as_csv([Q4]).replace("19.125", "nan"), "nan among its figures"),
        (as_csv([Q4]).replace("1433000000", "-1"), "-1 among its figures"),
        (as_csv([Q4]) + "more\n", "its columns are not"),
        (as_csv([Q4]) + "\n" * (1 << 20), "more than 1,048,576 bytes"),
    ):
        file.write_text(content)
        assert main([*COMPARE, "--devices", str(file), "--output", str(tmp_path / "x.png")]) == 2
        told = capsys.readouterr().err
        assert f"{file}: " in told and words in told, content[:200]
    file.write_bytes(b"\xff\xfe")
    assert main([*COMPARE, "--devices", str(file)]) == 2
    assert main([*COMPARE, "--devices", str(tmp_path / "absent.csv")]) == 2
    assert "absent.csv: cannot be read (No such file" in capsys.readouterr().err
    assert main(["report", "recipes", "--devices", str(file)]) == 2
    assert "--devices belongs to --compare" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
