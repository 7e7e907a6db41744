"""MobiLlama 0.5B and large-base, random weights, on a device: `python -m benchmarks.device_forms FOLDER`.

Writes both checkpoints under FOLDER (4 GB, kept for the next call), exports the 4-bit GGUF and the int4 ONNX form of
each, and MobiLlama's int8 CTranslate2 form, and prints what each export took and the table of
`python -m megatron_patch device`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_patch.devices.forms import find_form
from megatron_patch.model.counts import parameters
from megatron_patch.model.parameters import whole_tensors
from megatron_patch.recipe import Recipe, load
from megatron_patch.train.checkpoint.write import write_weights

MODELS = ("mobillama_05b", "large_base")
FORMS = {
    "q4_0.gguf": ["--form", "gguf", "--quantize", "q4_0"],
    "onnx-int4": ["--form", "onnx", "--quantize", "int4"],
}


@dataclass
class RandomWeights:
    """Weights as training starts from, drawn tensor by tensor."""

    recipe: Recipe
    step: int = 0
    samples: int = 0
    tokens: int = 0
    digest: str = ""
    data_digest: str | None = None

    def tensor(self, name: str) -> torch.Tensor:
        whole = whole_tensors(self.recipe.model)[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # equal tensors would be merged
        drawn = torch.randn(whole.shape, generator=generator) * self.recipe.model.init_std + (whole.kind == "norm")
        return drawn.to(torch.bfloat16)


def watched(command: list[str]) -> tuple[float, float]:
    """Runs a command; its seconds and the most memory of its own, in bytes: files that it maps are not."""
    began, most = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ended = threading.Event()

    def look() -> None:
        nonlocal most
        while not ended.wait(0.05):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            most = max(most, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)

    watcher = threading.Thread(target=look)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        sys.exit(f"{' '.join(command)}: exit code {code}")
    return time.perf_counter() - began, most


def prepare(folder: Path, name: str, tokenizer: Path) -> list[Path]:
    """The checkpoint and its forms; says what each export took."""
    recipe = load(f"recipes/{name}.yaml")
    checkpoint, counted = folder / name, parameters(recipe.model)
    if not checkpoint.exists():
        write_weights(RandomWeights(recipe), checkpoint)
    held = sum(file.stat().st_size for file in checkpoint.iterdir())
    forms = []
    program = [sys.executable, "-m", "megatron_patch", "export", str(checkpoint)]
    for form, words in FORMS.items():
        out = folder / f"{name}-{form}"
        if not out.exists():
            seconds, memory = watched([*program, str(out), *words, "--tokenizer", str(tokenizer)])
            print(f"| {name} | {form} | {seconds:.0f} | {memory / 1e6:,.0f} | {memory / held:.2f} |", flush=True)
        forms.append(out)
    if recipe.model.shared_ffn:  # what its converter is to find out
        forms.append(folder / f"{name}-ctranslate2-int8")
        if not forms[-1].exists():
            expanded = folder / f"{name}-expanded"
            subprocess.run([*program, str(expanded), "--form", "expanded", "--tokenizer", str(tokenizer)], check=True)
            converter = str(Path(sys.executable).with_name("ct2-transformers-converter"))
            words = ["--model", str(expanded), "--output_dir", str(forms[-1]), "--quantization", "int8"]
            seconds, memory = watched([converter, *words, "--low_cpu_mem_usage"])
            print(f"| {name} | CTranslate2 | {seconds:.0f} | {memory / 1e6:,.0f} | {memory / held:.2f} |", flush=True)
    for path in forms:
        form = find_form(path)
        size, unique = form.file_bytes, counted.unique
        print(f"{path.name}: {size:,} bytes, {8 * size / form.stored(recipe.model):.4f} bits a stored weight, "
              f"{size / unique:.4f} bytes a unique one")  # fmt: skip
    return [checkpoint, *forms]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoints and forms go: 12 GB")
    parser.add_argument("--threads", nargs="+", default=["1", "2"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = args.folder / "raw" / "tokenizer.model"
    if not tokenizer.exists():
        subprocess.run([sys.executable, "-m", "data_tools.demo_corpus", "--output", str(tokenizer.parent)], check=True)
    print("| Model | Export | Seconds | Memory MB | Of the checkpoint's bytes |\n|---|---|---:|---:|---:|")
    ours, theirs = (prepare(args.folder, name, tokenizer) for name in MODELS)
    words = [
        "--random",
        "--tokens",
        "100",
        "--new-tokens",
        "16",
        "--csv",
        str(args.folder / "devices.csv"),
        "--threads",
    ]
    command = [
        sys.executable,
        "-m",
        "megatron_patch",
        "device",
        *map(str, ours),
        "--against",
        *map(str, theirs),
        *words,
    ]
    return subprocess.run([*command, *args.threads], env={**os.environ, "OMP_NUM_THREADS": "2"}).returncode


if __name__ == "__main__":
    sys.exit(main())
