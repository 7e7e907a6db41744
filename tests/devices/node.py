"""transformers.js under node, which npm installs: for the soak, which alone has a network."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


def install(folder: Path) -> None:
    """transformers.js for the scripts in `folder`."""
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "@huggingface/transformers@4.3.1"]
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"})


def node(text: str, folder: Path, *words: str) -> str:
    """What a script prints that runs in `folder`."""
    (folder / "run.mjs").write_text(text)
    command = ["node", "run.mjs", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout


def run_in_node(script: str, folder: Path, question: Any) -> list[Any]:
    """What a script of this folder prints of `folder/out`, a JSON a line."""
    told = node(Path(__file__).with_name(script).read_text(), folder, str(folder), json.dumps(question))
    return [json.loads(line) for line in told.splitlines()]
