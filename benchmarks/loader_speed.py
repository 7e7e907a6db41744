"""Start-up and speed of the training side over 360 sparse segments of Amber's true size, against stock `GPTDataset`.

    python benchmarks/loader_speed.py

Three measurements, each a process of its own: time and memory to the first batch over 614,511,360 rows; CPU time a row
in reading order from page cache, against `GPTDataset.__getitem__` over the same bytes in the same run; and how long a
loop of 50 ms steps waits for its batch of 800 rows.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.dataset.format import (
    AMBER_SOURCES,
    SEED,
    DatasetManifest,
    SegmentManifest,
    bin_size,
    index_blocks,
    segment_name,
)
from data_tools.files.digest import new_digest
from data_tools.files.json_file import canonical_json

ROW_LENGTH, NUM_SEGMENTS, ROWS, BATCH = 2049, 360, 1_706_976, 800
PEER_ROWS = 60_000
STEP_S, STEPS = 0.05, 200


def make_data_set(folder: Path, num_segments: int, rows: int, sparse: bool) -> None:
    """A data set of zeros (sparse files) or of random ids; one index, linked to every segment."""
    digest = new_digest()
    with (folder / "index").open("wb") as stream:
        for block in index_blocks(rows, ROW_LENGTH):
            stream.write(block)
            digest.update(block)
    manifests = []
    for k in range(num_segments):
        base = folder / segment_name(k)
        os.link(folder / "index", base.with_suffix(".idx"))
        for suffix, size in (("bin", bin_size(rows, ROW_LENGTH)), ("src", rows)):
            with base.with_suffix(f".{suffix}").open("wb") as stream:
                if sparse or suffix == "src":
                    stream.truncate(size)
                else:
                    random = np.random.RandomState(k)
                    for _ in range(0, rows, 1000):
                        stream.write(random.randint(0, 32000, (1000, ROW_LENGTH)).astype("<u2").tobytes())
        digests = {"bin": "", "src": "", "idx": digest.hexdigest()}
        manifest = SegmentManifest(base.name, rows, ROW_LENGTH, 32000, {AMBER_SOURCES[0]: rows}, 0, {}, digests)
        base.with_suffix(".json").write_bytes(canonical_json(manifest.to_json()))
        manifests.append(manifest)
    counts = {AMBER_SOURCES[0]: rows * num_segments}
    whole = DatasetManifest(num_segments, rows, ROW_LENGTH, 32000, counts, 0, 0, None, manifests, None)
    (folder / "manifest.json").write_bytes(canonical_json(whole.to_json()))


def open_loader(folder: Path, num_segments: int, rows: int) -> Any:
    """One rank's loader of the whole global batch."""
    from megatron_patch.data.loader import Loader
    from megatron_patch.data.order import SampleOrder
    from megatron_patch.data.segments import open_segments

    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=32000)
    return Loader(
        segments, SampleOrder(num_segments, rows, BATCH, SEED), data_parallel_rank=0, data_parallel_size=1,
        micro_batch_size=5, num_micro_batches=BATCH // 5, samples_consumed=0,
    )  # fmt: skip


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start_up(folder: Path) -> dict[str, float]:
    """Seconds and memory from after the imports to the first batch."""
    import megatron_patch.data.loader
    import megatron_patch.data.segments  # noqa: F401

    before, begun, cpu = peak_mb(), time.perf_counter(), time.process_time()
    loader = open_loader(folder, NUM_SEGMENTS, ROWS)
    next(loader)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
    result = {"seconds": seconds, "cpu": cpu_seconds, "mb": peak_mb() - before}
    loader.close()
    return result


def rows_a_second(folder: Path) -> dict[str, float]:
    """CPU time a row in reading order: ours, then stock GPTDataset over the same file."""
    from megatron_patch.data.order import SampleOrder
    from megatron_patch.data.segments import open_segments

    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=32000)
    order = SampleOrder(1, PEER_ROWS, BATCH, SEED)
    batches = [order.batch(step * BATCH) for step in range(order.total_steps)]
    for segment, rows in batches:  # page cache and page tables, as for the peer below
        segments.read(segment, rows)
    begun = time.process_time()
    for segment, rows in batches:
        segments.read(segment, rows)
    ours = (time.process_time() - begun) / (order.total_steps * BATCH)

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(metadata_path={"library": "null"}, vocab_size=32000 - 1)
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=ROW_LENGTH - 1, blend=([str(folder / segment_name(0))], None), split="1,0,0",
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        path_to_cache=str(folder / "cache"), tokenizer=tokenizer,
    )  # fmt: skip
    data_set = BlendedMegatronDatasetBuilder(GPTDataset, [PEER_ROWS - 10, 0, 0], lambda: True, config).build()[0]
    count = 20_000
    for i in range(count):
        data_set[i]
    begun = time.process_time()
    for i in range(count):
        data_set[i]
    peer = (time.process_time() - begun) / count
    return {"ours_us": ours * 1e6, "peer_us": peer * 1e6}


def waiting(folder: Path) -> dict[str, float]:
    """Share of a loop of 50 ms steps spent waiting for data, after the first batch."""
    loader = open_loader(folder, 1, PEER_ROWS)
    next(loader)
    waits = []
    for _ in range(min(STEPS, PEER_ROWS // BATCH - 1)):
        time.sleep(STEP_S)  # the step: the GPU computes, this process does not
        begun = time.perf_counter()
        next(loader)
        waits.append(time.perf_counter() - begun)
    loader.close()
    return {"share": float(np.median(waits)) / STEP_S, "mean_share": float(np.mean(waits)) / STEP_S}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, name, str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps({"start": start_up, "rows": rows_a_second, "wait": waiting}[sys.argv[1]](Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as name:
        sparse, real = Path(name) / "sparse", Path(name) / "real"
        sparse.mkdir()
        real.mkdir()
        make_data_set(sparse, NUM_SEGMENTS, ROWS, sparse=True)
        make_data_set(real, 1, PEER_ROWS, sparse=False)
        start = measure("start", sparse)
        print(f"360 segments, {NUM_SEGMENTS * ROWS:,} rows, after imports to the first batch:", end=" ")
        print(
            f"{start['seconds']:.2f} s wall, {start['cpu']:.2f} s CPU (the next batches included), {start['mb']:.0f} MB"
        )
        rows = measure("rows", real)
        ratio = rows["peer_us"] / rows["ours_us"]
        print(f"a row: {rows['ours_us']:.2f} us, GPTDataset {rows['peer_us']:.1f} us: {ratio:.1f} times")
        wait = measure("wait", real)
        print(f"waiting for 800 rows in a 50 ms step: {wait['share']:.2%} (median), {wait['mean_share']:.2%} (mean)")
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
