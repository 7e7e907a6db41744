"""Speed of `build_amber.py tokenize` against sentencepiece's batch encode of the same text.

    python benchmarks/tokenize_speed.py [--megabytes 48] [--rounds 3]

The text is the demo's corpus and the standard library's other files, repeated with its documents shuffled until it is
long enough; the vocabulary is a 32,000-piece sentencepiece BPE trained on it. Each measurement is a process of its own;
ours is the whole stage (reading JSONL, JSON, UTF-8, ids, EOS, digest, writing), sentencepiece's is `encode` alone. The
ratio is of CPU time, which other work on the machine disturbs least. Every document's ids are compared with
sentencepiece's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from data_tools.pack.tokenize_source import SAMPLE_DOCUMENTS

VOCAB_SIZE = 32_000
TASK_BYTES = 1 << 23  # a real task has 1 GiB; here each of two workers must have several


def make_corpus(folder: Path, megabytes: int) -> None:
    """Writes raw/book/text.jsonl and tokenizer.model."""
    from data_tools.demo_corpus import code, docstrings, library_files, topics, train_tokenizer

    library = Path(sysconfig.get_path("stdlib"))
    files = library_files(library)
    documents = [*topics(), *docstrings(files), *code(files)]
    for path in sorted(library.glob("*/**/*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(documents) < 8000 and 200 <= len(text) <= 200_000:
            documents.append(text)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(documents, VOCAB_SIZE))
    chance = random.Random(0)
    target = folder / "raw" / "text.jsonl"
    target.parent.mkdir()
    written = 0
    with target.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1_000_000:
            chance.shuffle(documents)
            for text in documents:
                if written >= megabytes * 1_000_000:
                    break
                clean = text.encode(errors="ignore").decode()
                stream.write(json.dumps({"text": clean}, ensure_ascii=False) + "\n")
                written += len(clean.encode())


def derive(folder: Path) -> None:
    """raw_start/: the documents that the check at start samples; raw_twice/: the corpus two times."""
    (folder / "raw_start").mkdir()
    with (folder / "raw" / "text.jsonl").open("rb") as stream:
        (folder / "raw_start" / "text.jsonl").write_bytes(b"".join(stream.readline() for _ in range(SAMPLE_DOCUMENTS)))
    (folder / "raw_twice").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copyfile(folder / "raw" / "text.jsonl", folder / "raw_twice" / name)


def texts_of(folder: Path) -> list[str]:
    """The corpus's documents."""
    return [json.loads(line)["text"] for line in (folder / "raw" / "text.jsonl").open(encoding="utf-8")]


def stage(folder: Path, output: Path, workers: int, raw: str = "raw") -> None:
    """The whole `tokenize` stage."""
    from data_tools.pack.tokenize_source import tokenize_source

    tokenize_source(
        "book", folder / raw, output, folder / "tokenizer.model",
        row_length=2049, workers=workers, task_bytes=TASK_BYTES,
    )  # fmt: skip


def measure_here(name: str, folder: Path, output: Path) -> dict[str, float]:
    """Runs one measurement in this process."""
    if name == "sentencepiece":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        texts = texts_of(folder)[::8]  # it is slow; its speed does not depend on the amount
        size = sum(len(text.encode()) for text in texts)
        wall, cpu = time.perf_counter(), time.process_time()
        model.encode(texts, num_threads=1)
        return {"bytes": size, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    size = (folder / "raw" / "text.jsonl").stat().st_size
    if name == "ours":
        stage(folder, output / "warm", 1)  # imports
        times = []
        for raw in ("raw_start", "raw"):  # start-up: the tokenizer's load and the check of a sample
            wall, cpu = time.perf_counter(), time.process_time()
            stage(folder, output / raw, 1, raw)
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        size -= (folder / "raw_start" / "text.jsonl").stat().st_size
        wall, cpu = (whole - start for whole, start in zip(times[1], times[0], strict=True))
        return {"bytes": size, "wall": wall, "cpu": cpu, "start_up": times[0][1]}
    wall = time.perf_counter()
    if name == "two workers":
        stage(folder, output / "two", 2, raw="raw_twice")  # as much work a process as the copies have
        size_done = 2 * size
    else:  # two independent copies of the same loop
        context = multiprocessing.get_context("spawn")
        copies = [context.Process(target=stage, args=(folder, output / str(i), 1)) for i in range(2)]
        for process in copies:
            process.start()
        for process in copies:
            process.join()
        size_done = 2 * size
    return {"bytes": size_done, "wall": time.perf_counter() - wall, "cpu": 0.0}


def compare_ids(folder: Path) -> tuple[int, int]:
    """Documents, and those whose ids differ from sentencepiece's."""
    from data_tools.sources.text_encoder import TextEncoder

    encoder = TextEncoder(folder / "tokenizer.model")
    texts = list(dict.fromkeys(texts_of(folder)))
    stream, lengths = encoder.encode(texts)
    differing, at = 0, 0
    for text, length in zip(texts, lengths.tolist(), strict=True):
        differing += stream[at : at + length].tolist() != encoder.encode_reference(text)
        at += length
    return len(texts), differing


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [sys.executable, __file__, "--child", name, str(folder), output]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, folder, output = sys.argv[2:]
        print(json.dumps(measure_here(name, Path(folder), Path(output))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    names = ["sentencepiece", "ours", "two workers", "two copies"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder, arguments.megabytes)
        derive(folder)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                results[name].append(measure(name, folder))
        rates = {}
        for name in names:
            clock = "wall" if name.startswith("two") else "cpu"
            rates[name] = statistics.median(run["bytes"] / run[clock] / 1e6 for run in results[name])
            print(f"{name:<16}{rates[name]:>8.2f} MB/s of {'wall' if clock == 'wall' else 'CPU'} time")
        print(
            f"our start-up, timed apart: {statistics.median(run['start_up'] for run in results['ours']):.2f} s of CPU"
        )
        print(f"ours / sentencepiece, one core: {rates['ours'] / rates['sentencepiece']:.2f}")
        print(f"two workers / two independent copies: {rates['two workers'] / rates['two copies']:.2f}")
        documents, differing = compare_ids(folder)
        print(f"ids equal to sentencepiece's: {documents - differing} of {documents} distinct documents")
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
