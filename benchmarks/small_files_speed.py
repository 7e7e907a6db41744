"""Speed of `build_amber.py tokenize` on a source of many small files, against a record a file.

    python benchmarks/small_files_speed.py [--files 20000] [--rounds 3]

Each file holds one document of a few words, as repositories of code do. The peer reads a file, encodes it with
sentencepiece and writes its ids and a marker, both fsynced and renamed: what `tokenize` promises, file by file, without
the digests. Ours is the whole command with two workers, start-up included; a second run of it, which finds all
finished, is timed too. The last line says whether it is 1,000 files a second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER_FILES = 500  # it is slow, and its speed does not depend on their number


def make_source(folder: Path, files: int) -> None:
    """Writes tokenizer.model and raw/NNN/NNNNNN.jsonl, one document each."""
    from data_tools.demo_corpus import topics, train_tokenizer

    texts = topics()
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 2048))
    words = " ".join(texts).split()
    for i in range(files):
        path = folder / "raw" / f"{i // 1000:03d}" / f"{i:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        at = i * 37 % (len(words) - 40)
        path.write_text(json.dumps({"text": " ".join(words[at : at + 40])}) + "\n", encoding="utf-8")


def ours(folder: Path, output: Path) -> tuple[float, float]:
    """Seconds of the whole command: of the clock, and of CPU."""
    begun, cpu = time.perf_counter(), sum(os.times()[2:4])
    command = [sys.executable, "-m", "data_tools.build_amber", "tokenize", "--source", "book"]
    command += ["--input", str(folder / "raw"), "--output", str(output), "--workers", "2", "--row-length", "2049"]
    command += ["--tokenizer", str(folder / "tokenizer.model")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun, sum(os.times()[2:4]) - cpu


def peer(folder: Path, output: Path) -> float:
    """Files a second of one process that does a file at a time, durably."""
    import sentencepiece

    from data_tools.files.durable import write_whole

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    paths = sorted((folder / "raw").rglob("*.jsonl"))[:PEER_FILES]
    output.mkdir()
    begun = time.perf_counter()
    for number, path in enumerate(paths):
        ids = [i for line in path.open("rb") for i in [*model.encode(json.loads(line)["text"]), model.eos_id()]]
        write_whole(output / f"{number:06d}.tokens", b"".join(i.to_bytes(2, "little") for i in ids))
        write_whole(output / f"{number:06d}.json", json.dumps({"tokens": len(ids)}).encode())
    return len(paths) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_source(folder, arguments.files)
        first, again, by_file = [], [], []
        for i in range(arguments.rounds):
            first.append(ours(folder, folder / f"out{i}"))
            again.append(ours(folder, folder / f"out{i}"))
            by_file.append(peer(folder, folder / f"peer{i}"))
        parts = len(list((folder / "out0/book").glob("part_*.tokens")))
    rate, finished = (arguments.files / statistics.median(wall for wall, _ in runs) for runs in (first, again))
    of_cpu = arguments.files / statistics.median(cpu for _, cpu in first)
    print(f"a file at a time  {statistics.median(by_file):>10,.0f} files/s, one process")
    print(
        f"ours              {rate:>10,.0f} files/s, start-up included, in {parts} parts; {of_cpu:,.0f} a second of CPU"
    )
    print(f"ours, finished    {finished:>10,.0f} files/s")
    print(f"ours / a file at a time: {rate / statistics.median(by_file):.1f}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{rate:,.0f} files a second, {'at least' if rate >= 1000 else 'LESS THAN'} 1,000")


if __name__ == "__main__":
    main()
