"""docs/devices.md as a reader follows it: each command and script that a runtime of the extra `devices` can run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from ctranslate2.converters import transformers as converter

from megatron_patch.__main__ import main
from megatron_patch.train.checkpoint.write import write_weights
from tests.devices.documents import blocks, commands
from tests.devices.models import device_weights


def test_what_a_reader_types(
    device_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_weights(device_weights(), Path("CKPT"))
    exports = [c for c in commands("python -m megatron_patch export") if "executorch" not in c]  # its own soak has that
    assert len(exports) == 6
    for command in exports:
        assert main([*shlex.split(command)[3:], "--tokenizer", str(device_tokenizer)]) == 0, command
    [command] = commands("python -m megatron_patch import")
    assert main(shlex.split(command)[3:]) == 0
    [command] = commands("ct2-transformers-converter")
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    converter.main()

    scripts = [block for block in blocks() if re.match(r"(from|import) (?!\{)", block)]
    assert [script.split()[1] for script in scripts] == ["ctranslate2", "transformers"]
    capsys.readouterr()
    for script in scripts:
        exec(compile(script, "docs/devices.md", "exec"), {})  # our own document
        told = capsys.readouterr().out
        assert "The function returns" in told and len(told) > 60, script


def test_the_server(device_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's, from the wheel, and the request to it."""
    monkeypatch.chdir(tmp_path)
    write_weights(device_weights(), Path("CKPT"))
    [export] = [line for line in commands("python -m megatron_patch export") if line.endswith("--quantize q4_0")]
    assert main([*shlex.split(export)[3:], "--tokenizer", str(device_tokenizer)]) == 0
    [command] = commands("python -c")
    words = shlex.split(command.replace("8080", "0"))
    server = subprocess.Popen([sys.executable, *words[1:]], stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        [request] = commands("curl")
        place, body = re.findall(r"localhost:8080(\S+) .*-d '(.*)'", request)[0]
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address + place, body.encode(), headers)) as answer:
            told = json.load(answer)
        assert told["choices"][0]["text"] and told["usage"]["completion_tokens"] == json.loads(body)["max_tokens"]
    finally:
        server.kill()
        server.wait()
