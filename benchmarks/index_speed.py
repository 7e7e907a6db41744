"""Speed of `build_amber.py index` against orjson + Megatron-Core's IndexedDatasetBuilder, on one segment.

    python benchmarks/index_speed.py [--rows 34000] [--rounds 3] [--folder DIR]

Every measurement is a process of its own, pinned to one core (the cold one to all), page cache to page cache; imports,
start-up and fsync are timed apart. The ratio is of CPU time (user and system), which other work on the machine disturbs
least; wall time stands beside it. The rows are random ids whose numbers of digits are distributed as in Amber's
published sample (2 to 5 digits: 6.0 %, 33.7 %, 32.1 %, 28.2 %), so a line has Amber's length.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROW_LENGTH = 2049
DIGITS = (2, 3, 4, 5)
SHARES = (0.060, 0.337, 0.321, 0.282)
PEER = "orjson + add_document"


def make_segment(path: Path, rows: int) -> None:
    """Writes a segment of `rows` rows."""
    from data_tools.dataset.format import AMBER_SOURCES, VOCAB_SIZE
    from data_tools.index.jsonl_segments import jsonl_lines

    random = np.random.RandomState(0)
    with path.open("wb") as stream:
        for start in range(0, rows, 500):
            count = min(500, rows - start)
            digits = random.choice(DIGITS, p=SHARES, size=(count, ROW_LENGTH))
            low, high = 10 ** (digits - 1), np.minimum(10**digits, VOCAB_SIZE)
            ids = (low + random.random_sample(digits.shape) * (high - low)).astype("<u2")
            stream.write(jsonl_lines(ids, random.randint(0, len(AMBER_SOURCES), count).astype(np.uint8), AMBER_SOURCES))
        stream.flush()
        os.fsync(stream.fileno())


def read_through(path: Path) -> None:
    """Brings a file into the page cache."""
    with path.open("rb", buffering=0) as stream:
        while stream.read(1 << 22):
            pass


def drop_from_cache(path: Path) -> None:
    """Takes a file out of the page cache."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def index_ours(path: Path, output: Path, kernel: str, threads: int) -> dict[str, float]:
    """Our index of one segment, digests, sources and `.idx` included."""
    from data_tools.dataset.segment_files import DatasetPlan
    from data_tools.files.errors import ErrorPolicy
    from data_tools.index import index_segments

    index_segments.SegmentReader = functools.partial(index_segments.SegmentReader, kernel=kernel)  # type: ignore[misc,assignment]
    spent = {"fsync": 0.0, "fsync_cpu": 0.0}
    real_fsync = os.fsync

    def timed_fsync(descriptor: int) -> None:
        begun, cpu = time.perf_counter(), time.process_time()
        real_fsync(descriptor)
        spent["fsync"] += time.perf_counter() - begun
        spent["fsync_cpu"] += time.process_time() - cpu

    os.fsync = timed_fsync
    plan = DatasetPlan(num_segments=1, row_length=ROW_LENGTH, vocab_size=32000, tokenizer=None)
    begun, cpu = time.perf_counter(), time.process_time()
    index_segments.index_segment(path, output / "segment_000", plan, ErrorPolicy(), threads)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return {"seconds": seconds - spent["fsync"], "cpu": cpu - spent["fsync_cpu"], "fsync": spent["fsync"]}


def index_peer(path: Path, output: Path) -> dict[str, float]:
    """orjson and the stock builder, as tools/preprocess_data.py calls it; no digest, no sources, no checks."""
    import orjson
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    begun, cpu = time.perf_counter(), time.process_time()
    builder = IndexedDatasetBuilder(str(output / "peer.bin"), dtype=np.uint16)
    with path.open("rb") as stream:
        for line in stream:
            ids = orjson.loads(line)["token_ids"]
            builder.add_document(ids, [len(ids)])
    builder.finalize(str(output / "peer.idx"))
    return {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu, "fsync": 0.0}


def copy(path: Path, output: Path) -> dict[str, float]:
    """A plain copy of the same bytes."""
    begun, cpu = time.perf_counter(), time.process_time()
    with path.open("rb", buffering=0) as source, (output / "copy").open("wb", buffering=0) as target:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        shutil.copyfileobj(source, target, 1 << 20)
    return {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu, "fsync": 0.0}


def measure_here(name: str, path: Path, output: Path, cores: int) -> dict[str, Any]:
    """Runs one measurement in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    started = time.perf_counter()
    if name == PEER:
        result = index_peer(path, output)
    elif name == "copy":
        result = copy(path, output)
    else:
        result = index_ours(path, output, name, threads=cores)
    total = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**result, "imports": total - result["seconds"] - result["fsync"], "peak_mb": peak}


def measure(name: str, path: Path, cores: int, cold: bool) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    with tempfile.TemporaryDirectory(dir=path.parent) as output:
        (drop_from_cache if cold else read_through)(path)
        command = [sys.executable, __file__, "--child", name, str(path), output, str(cores)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, path, output, cores = sys.argv[2:]
        print(json.dumps(measure_here(name, Path(path), Path(output), int(cores))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=34_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the segment is written")
    arguments = parser.parse_args()
    from data_tools.index._core import kernels

    names = [PEER, *(name for name in kernels())]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "train_000.jsonl"
        make_segment(path, arguments.rows)
        size = path.stat().st_size
        print(f"segment: {arguments.rows:,} rows, {size / 1e6:.0f} MB, {size / arguments.rows:.0f} bytes a line")
        warm: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                warm[name].append(measure(name, path, cores=1, cold=False))
        report(warm, size, PEER, "cpu", "one core, page cache to page cache")
        cold: dict[str, list[dict[str, Any]]] = {"copy": [], names[1]: []}
        for _ in range(arguments.rounds + 2):
            for name in cold:
                cold[name].append(measure(name, path, cores=len(os.sched_getaffinity(0)), cold=True))
        report(cold, size, "copy", "seconds", f"{len(os.sched_getaffinity(0))} cores, cold cache")


def report(results: dict[str, list[dict[str, Any]]], size: int, peer: str, clock: str, title: str) -> None:
    """Prints medians, and ratios by `clock`: CPU time ("cpu") or wall time ("seconds")."""
    of = "CPU" if clock == "cpu" else "wall"
    print(f"\n{title}; ratio of {of} time\n{'':<24}{'wall MB/s':>10}{'CPU MB/s':>10}{'ratio':>8}", end="")
    print(f"{'fsync s':>9}{'imports s':>11}{'peak MB':>9}")

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in results[name])

    for name, runs in results.items():
        print(
            f"{name:<24}{size / median(name, 'seconds') / 1e6:>10.0f}{size / median(name, 'cpu') / 1e6:>10.0f}"
            f"{median(peer, clock) / median(name, clock):>8.2f}{median(name, 'fsync'):>9.2f}"
            f"{median(name, 'imports'):>11.2f}{max(run['peak_mb'] for run in runs):>9.0f}"
        )
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
