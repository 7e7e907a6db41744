"""ONNX folders in transformers.js: ONNX Runtime's tokens, and the document's script."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megatron_patch.convert.onnx_folder import FILES, write_onnx
from megatron_patch.devices.runtimes import OnnxRuntime
from tests.devices.documents import blocks
from tests.devices.models import PROMPTS, device_weights
from tests.devices.node import install, node, run_in_node

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("node")
    install(folder)
    return folder


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_greedy_tokens_are_onnx_runtimes(kind: str | None, project: Path, device_tokenizer: Path) -> None:
    shutil.rmtree(project / "out", ignore_errors=True)
    write_onnx(device_weights(), project / "out", device_tokenizer, kind)
    model = OnnxRuntime(project / "out" / "onnx" / FILES[kind], threads=1)
    told = run_in_node("transformers_js.mjs", project, PROMPTS.tolist())
    assert told == [model.greedy(row, 16).ids for row in PROMPTS.tolist()]


def test_the_documents_script(project: Path, device_tokenizer: Path) -> None:
    [script] = [block for block in blocks() if block.startswith("import { pipeline")]
    write_onnx(device_weights(), project / "mobillama-onnx", device_tokenizer, "int4")
    [text] = re.findall(r"generated_text: (.*)", node(script, project), re.DOTALL)
    assert "The function returns" in text and len(text) > 60
