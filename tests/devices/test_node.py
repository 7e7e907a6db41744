"""ONNX folders in transformers.js under node, which npm installs: the soak alone has a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_patch.convert.onnx_folder import FILES, write_onnx
from megatron_patch.devices.runtimes import OnnxRuntime
from tests.devices.documents import blocks
from tests.devices.models import PROMPTS, device_weights

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose node_modules has transformers.js."""
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "@huggingface/transformers@4.3.1"]
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"})
    return folder


def node(script: Path, *words: str) -> str:
    command = ["node", str(script), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=script.parent).stdout


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_greedy_tokens_are_onnx_runtimes(kind: str | None, project: Path, device_tokenizer: Path) -> None:
    shutil.rmtree(project / "out", ignore_errors=True)
    write_onnx(device_weights(), project / "out", device_tokenizer, kind)
    model = OnnxRuntime(project / "out" / "onnx" / FILES[kind], threads=1)
    shutil.copy(Path(__file__).with_name("transformers_js.mjs"), project / "run.mjs")
    told = node(project / "run.mjs", str(project), json.dumps(PROMPTS.tolist()))
    assert [json.loads(line) for line in told.splitlines()] == [model.greedy(row, 16).ids for row in PROMPTS.tolist()]


def test_the_documents_script(project: Path, device_tokenizer: Path) -> None:
    [script] = [block for block in blocks() if block.startswith("import { pipeline")]
    write_onnx(device_weights(), project / "mobillama-onnx", device_tokenizer, "int4")
    (project / "document.mjs").write_text(script)
    [text] = re.findall(r"generated_text: (.*)", node(project / "document.mjs"), re.DOTALL)
    assert "The function returns" in text and len(text) > 60
