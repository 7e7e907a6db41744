"""`python -m tests.devices.killed FOLDER TOKENIZER [FORM]`: exports killed by SIGKILL, in a process without threads.

An export's events are each tensor that it is about to read or write and each file or folder that it opens, makes,
renames or removes. It is run once to count them, then killed before the first, the last and some between, then run once
more over what the last one left. Afterwards FOLDER holds a folder for each form, with `out` alone, whole.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.files.digest import digest_file
from megatron_patch.convert import export, gguf_file, onnx_folder
from tests.convert.samples import MemoryWeights
from tests.devices.models import device_weights

FORMS = ("gguf", "onnx", "shared")
PLACES = 8


def export_to(out: Path, form: str, tokenizer: Path) -> None:
    if form == "gguf":
        gguf_file.write_gguf(device_weights(), out, tokenizer)
    elif form == "onnx":
        onnx_folder.write_onnx(device_weights(), out, tokenizer, "int8")
    elif form == "executorch":
        from megatron_patch.convert import executorch_file

        executorch_file.write_executorch(device_weights("model.num_layers=2"), out, tokenizer)
    else:
        export.export(device_weights(), out, "shared", tokenizer)


def counted(folder: Path, last: float) -> Callable[[], int]:
    """From here on events are counted; the one of that number is this process's end."""
    seen = 0

    def event() -> None:
        nonlocal seen
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def audit(name: str, words: tuple[Any, ...]) -> None:
        if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(words[0]).startswith(str(folder)):
            event()

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*words: Any) -> Any:
            event()
            return function(*words)

        return called

    MemoryWeights.tensor = before(MemoryWeights.tensor)  # type: ignore[method-assign]
    gguf_file._stored = before(gguf_file._stored)  # type: ignore[assignment]
    onnx_folder._external = before(onnx_folder._external)  # type: ignore[assignment]
    export._rounded = before(export._rounded)  # type: ignore[assignment]
    sys.addaudithook(audit)
    return lambda: seen


def lower_once() -> None:
    """Lowers ExecuTorch's program here, for all exports after: it takes half a minute, and writes nothing."""
    from megatron_patch.convert import executorch_file

    kept: list[Any] = []
    lower = executorch_file._lowered

    def lowered(*words: Any) -> Any:
        kept[:] = kept or [lower(*words)]
        return kept[0]

    executorch_file._lowered = lowered
    with tempfile.TemporaryDirectory() as folder:
        export_to(Path(folder) / "out", "executorch", Path(sys.argv[2]))


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): digest_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def main(folder: Path, tokenizer: Path, form: str) -> None:
    reader, writer = os.pipe()
    if not (child := os.fork()):
        seen = counted(folder, float("inf"))
        export_to(folder / "out", form, tokenizer)
        os.write(writer, str(seen()).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    events, whole = int(os.read(reader, 100)), contents(folder)
    found = set()
    for place in range(PLACES):
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").unlink(missing_ok=True)
        if not (child := os.fork()):
            counted(folder, place * (events - 1) // (PLACES - 1))
            export_to(folder / "out", form, tokenizer)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, place
        left = {path.name for path in folder.iterdir()}
        assert left <= {"out", "out.partial"}, left
        if "out" in left:
            assert {name: x for name, x in contents(folder).items() if ".partial" not in name} == whole, place
        found.add("out" in left)
    assert False in found and events > 25, (found, events)
    if not (folder / "out").exists():
        export_to(folder / "out", form, tokenizer)
    assert contents(folder) == whole


if __name__ == "__main__":
    forms = sys.argv[3:] or FORMS
    if "executorch" in forms:
        lower_once()
    for form in forms:
        (Path(sys.argv[1]) / form).mkdir()
        main(Path(sys.argv[1]) / form, Path(sys.argv[2]), form)
