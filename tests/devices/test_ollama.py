"""The Modelfiles of docs/devices.md: Ollama's syntax, and the chat template's text in Go's own template engine.

Ollama itself cannot be had from a package registry. What it gives a template (Messages, System) and that a model
without one gets the bare question is by its documentation. Left out without Go (Debian: golang-go).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from data_tools.chat.template import ChatTokenizer
from data_tools.packing_options import DEFAULT_TEMPLATE
from tests.devices.documents import blocks, commands

COMMAND = re.compile(r'(FROM|PARAMETER \w+|TEMPLATE) ("""(?:.*?)"""|[^"\n]+)\n', re.DOTALL)
"""An instruction and its value: to the end of the line, or between triple quotes as it stands."""
CONVERSATIONS = [
    [("user", "What is a list?")],
    [("system", "Be brief."), ("user", "What is a list?"), ("assistant", "A sequence."), ("user", "And\n\na dict?")],
    [("user", "é, 漢字"), ("assistant", "{{ .Content }}"), ("user", "<b>&"), ("assistant", "Yes."), ("user", "Why?")],
]


def modelfiles() -> list[dict[str, str]]:
    found = []
    for block in blocks():
        if block.startswith("FROM"):
            assert COMMAND.sub("", block + "\n") == "", "an instruction that a Modelfile does not have"
            found.append(
                {name: value.removeprefix('"""').removesuffix('"""') for name, value in COMMAND.findall(block + "\n")}
            )
    return found


def test_a_modelfile_for_text_and_one_for_a_chat() -> None:
    """Both run the file that the document's first table writes, with the context that the recipes train."""
    text, chat = modelfiles()
    [written] = [c.split()[5] for c in commands("python -m megatron_patch export") if c.endswith("--quantize q4_0")]
    for file in (text, chat):
        assert file["FROM"] == f"./{written}" and file["PARAMETER num_ctx"] == "2048"
    assert "TEMPLATE" not in text and "TEMPLATE" in chat


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go (Debian: golang-go)")
def test_the_template_says_what_ours_says(device_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "template").write_text(modelfiles()[1]["TEMPLATE"])
    program = tmp_path / "render"
    source = Path(__file__).with_name("ollama_template.go")
    subprocess.run(["go", "build", "-o", program, source], check=True, cwd=tmp_path)
    ours = ChatTokenizer(device_tokenizer, DEFAULT_TEMPLATE)
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        told = subprocess.run(
            [program, tmp_path / "template"], input=json.dumps(messages), capture_output=True, text=True, check=True
        )
        expected = ours.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert told.stdout == expected
