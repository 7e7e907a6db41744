"""What one FFN saves in ExecuTorch: `python -m benchmarks.executorch_memory FOLDER [--quantize 8da4w] [key=value ...]`.

Exports random weights of the 0.5B's recipe, changed as said, with one FFN and with one a layer, and prints the size of
each file and what a process takes that has opened it and decoded two tokens, with XNNPACK's cache of packed weights and
without. Lowering is slow: give it few layers (`model.num_layers=8`).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.device_forms import RandomWeights
from megatron_patch.convert.executorch_file import write_executorch
from megatron_patch.recipe import load

NUM_FFNS = {"one FFN": "1", "one a layer": "null"}


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    found = re.search(r"^RssAnon:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def opened(file: Path, cache: bool) -> int:
    """Bytes that opening and decoding took, beyond ExecuTorch itself. Once a process."""
    from executorch.runtime import Runtime

    from megatron_patch.devices import runtimes

    if not cache:
        runtimes._cache_packed_weights = lambda: None
    Runtime.get()
    before = anonymous_bytes()
    model = runtimes.ExecuTorch(file, 1, 8)
    model.greedy([5, 6], 2)
    return anonymous_bytes() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files go; those that are there are not written again")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    parser.add_argument("--quantize", choices=("8da4w",))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--opened", choices=("on", "off"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.opened:
        print(opened(args.folder, args.opened == "on"))
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = args.folder / "raw" / "tokenizer.model"
    if not tokenizer.exists():
        subprocess.run([sys.executable, "-m", "data_tools.demo_corpus", "--output", str(tokenizer.parent)], check=True)
    print("| FFNs | file bytes | memory, cache on | off |\n|---|---:|---:|---:|")
    for told, number in NUM_FFNS.items():
        recipe = load("recipes/mobillama_05b.yaml", [*args.overrides, f"model.num_ffns={number}"])
        file = args.folder / f"{told.replace(' ', '_')}-{args.quantize or 'fp32'}.pte"
        if not file.exists():
            write_executorch(RandomWeights(recipe), file, tokenizer, args.quantize, args.context)
        taken = []
        for cache in ("on", "off"):
            command = [sys.executable, "-m", "benchmarks.executorch_memory", str(file), "--opened", cache]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            taken.append(int(found.split()[-1]))
        print(f"| {told} | {file.stat().st_size:,} | {taken[0]:,} | {taken[1]:,} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
