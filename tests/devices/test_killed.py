"""An export that is killed leaves its output whole or absent, and the next one starts over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_whole_or_absent_wherever_it_is_killed(device_tokenizer: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.devices.killed", str(tmp_path), str(device_tokenizer)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert told.returncode == 0, told.stderr
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert left == ["gguf/out", "onnx/out", "shared/out"]
