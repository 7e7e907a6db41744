"""How the verbs' cost grows with a run: its log up to 767,880 steps, its milestones up to 360 of 160 ranks.

    python -m benchmarks.run_size [--run demo/run] [--shares 0.1 0.3 1] [--out FILE.md]

Made from a finished `make demo`: its log, step after step again under the numbers of the real run (208 MB); beside its
checkpoints, milestones of the 0.5B whose 160 files a milestone are sparse, of the size that they have, with index,
marker and table as training writes them. Of each verb the CPU seconds of the whole command, start-up included, and its
most memory. Rows that name no verb are what a verb does with milestones before it touches their weights.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_tools.files.digest import digest_file
from data_tools.files.durable import write_whole
from megatron_patch.model.parameters import whole_tensors
from megatron_patch.recipe import Recipe, load
from megatron_patch.run import milestones
from megatron_patch.run.log import record_of
from megatron_patch.run.milestones import TABLE_NAME, Milestone

STEPS, MILESTONES, RANKS, RUNS = 767_880, 360, 160, 10
_STEPS_A_MILESTONE = STEPS // MILESTONES
_HEADER_BYTES = 8192  # of a safetensors file, about


def make_log(demo: Path, log: Path, steps: int) -> None:
    """The lines of the demo's log over and over, with the steps, samples, tokens and times of a longer run."""
    lines = [record_of(line) for line in demo.read_bytes().splitlines()]
    batch, length = 800, 2048
    time, step = lines[0]["time"], 0
    with log.open("wb", buffering=1 << 20) as stream:
        for record in itertools.cycle(lines):
            if "seconds" in record:
                if step == steps:
                    return
                step += 1
                time += record["seconds"]
                record |= {"samples": step * batch, "tokens": step * batch * length}
            stream.write(json.dumps(record | {"step": step, "time": time}).encode() + b"\n")


def make_milestones(folder: Path, recipe: Recipe, count: int) -> None:
    """`count` milestones of weights, every 36th a full one, and their table."""
    from megatron_patch.train.checkpoint.format import Index, Marker, State, StoredFile, rank_file, to_json

    rows: list[dict[str, str]] = []
    tensors, sizes = _sharded(recipe)
    digests: dict[int, str] = {}
    for number in range(count):
        contents = "full" if number % 36 == 35 else "weights"
        path = folder / f"ckpt_{number:03d}"
        path.mkdir(parents=True)
        files = {}
        for rank, size in enumerate(sizes):
            file = path / rank_file(rank)
            with file.open("wb") as stream:
                stream.truncate(bytes_ := _HEADER_BYTES + size * (14 if contents == "full" else 2))
            digest = digests[bytes_] = digests.get(bytes_) or digest_file(file)
            files[file.name] = StoredFile(bytes=bytes_, xxh3_128=digest)
        step = (number + 1) * _STEPS_A_MILESTONE
        samples = step * recipe.batch.global_batch_size
        state = State(
            step=step,
            samples=samples,
            tokens=samples * recipe.model.sequence_length,
            optimizer_step=step,
            data_digest="0" * 64,
            spike_window=[2.0] * recipe.watchdog.spike_window,
        )
        index = Index(
            contents=contents,  # type: ignore[arg-type]
            state=state,
            recipe=recipe,
            layout="160 ranks",
            environment={},
            tensors=tensors,
        )
        (path / "index.json").write_bytes(to_json(index))
        files["index.json"] = StoredFile(
            bytes=(path / "index.json").stat().st_size, xxh3_128=digest_file(path / "index.json")
        )
        marker = Marker.of(files)
        (path / "COMPLETE").write_bytes(to_json(marker))
        written = datetime.fromtimestamp((path / "COMPLETE").stat().st_mtime, UTC).isoformat(timespec="seconds")
        line = Milestone(path.name, step, samples, state.tokens, f"{number}-{number}", written, contents, marker.digest)
        table = milestones.with_line(rows, line)
        write_whole(folder / TABLE_NAME, table)
        rows, _ = milestones.read(folder / TABLE_NAME)


def _sharded(recipe: Recipe) -> tuple[dict[str, Any], list[int]]:
    """All tensors one after the other, cut into as many equal shards as there are ranks; elements of each shard."""
    from megatron_patch.train.checkpoint.format import StoredFragment, StoredTensor, rank_file

    wholes = whole_tensors(recipe.model)
    total = sum(math.prod(whole.shape) for whole in wholes.values())
    shard = -(-total // RANKS)
    tensors, place = {}, 0
    for name, whole in wholes.items():
        fragments = []
        at, end = place, place + math.prod(whole.shape)
        while at < end:
            stop = min(end, (at // shard + 1) * shard)
            fragments.append(StoredFragment(file=rank_file(at // shard), part=0, offset=at - place, length=stop - at))
            at = stop
        tensors[name] = StoredTensor(shape=whole.shape, cut=whole.cut, parts=1, fragments=fragments)
        place = end
    return tensors, [min(shard, total - rank * shard) for rank in range(RANKS)]


def make_run(demo: Path, folder: Path, share: float) -> None:
    """A folder of ten runs, of which the first has the milestones: `share` of the real run's size."""
    first = folder / "run0"
    shutil.copytree(demo, first, ignore=shutil.ignore_patterns("log.jsonl", "ckpt_*", TABLE_NAME))
    make_log(demo / "log.jsonl", first / "log.jsonl", round(share * STEPS))
    recipe = load(Path("recipes/mobillama_05b.yaml"))
    make_milestones(first / "checkpoints", recipe, round(share * MILESTONES))
    for number in range(1, RUNS):
        other = folder / f"run{number}"
        other.mkdir()
        for name in ("log.jsonl", "recipe.yaml", "status.json", "checkpoints"):
            (other / name).symlink_to(first / name)


_MEASURE = """
import os, sys
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
_, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)
os.write(out, f"{usage.ru_utime + usage.ru_stime} {usage.ru_maxrss / 1024}".encode())
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""
"""A process of its own: Linux counts what a process held before its exec, which is what its parent held."""


def measured(command: list[str]) -> tuple[float, float]:
    """CPU seconds of a command, and the MB that it held at most."""
    done = subprocess.run([sys.executable, "-S", "-c", _MEASURE, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")
    seconds, mb = map(float, done.stdout.split())
    return seconds, mb


def resume_looks(run: Path) -> None:
    """What rank 0 of a resume does before the ranks compare the files of the checkpoint that they go on from."""
    from megatron_patch.train.checkpoint.milestones import missing_lines
    from megatron_patch.train.checkpoint.run_folder import RunFolder
    from megatron_patch.train.loggers.json_lines import JsonLines

    recipe = load(run / "recipe.yaml", [f"run.folder={run}"])
    folder = RunFolder(recipe)
    folder.sweep()
    assert folder.candidates()
    assert not list(missing_lines(folder, None))  # type: ignore[arg-type]  # the order of rows is for missing ones
    JsonLines(run / "log.jsonl", STEPS).close()


def watch_looks(run: Path) -> None:
    """What `eval RUN --watch` does of each milestone when it begins; later looks ask the file system alone."""
    from megatron_patch.evaluate.models import checkpoint, checkpoints_in

    assert [checkpoint(path) for path in checkpoints_in(run)]


def newest_is_sound(run: Path) -> None:
    """Compares a milestone's files with their checksums, as `export`, `eval` and a resume do of the one they read."""
    from megatron_patch.train.checkpoint.reader import open_checkpoint

    open_checkpoint(run / "checkpoints/ckpt_000").close()


def imports_alone(run: Path) -> None:
    """To be taken from the rows above."""
    for name in ("evaluate.models", "train.checkpoint.milestones", "train.loggers.json_lines"):
        importlib.import_module(f"megatron_patch.{name}")


LOOKS: dict[str, Callable[[Path], None]] = {
    "resume: milestones, end of the log": resume_looks,
    "eval --watch: every milestone opened": watch_looks,
    "one milestone's checksums, 1.1 GB": newest_is_sound,
    "what these three import": imports_alone,
}


def commands(folder: Path) -> Iterator[tuple[str, list[str]]]:
    run, patch = folder / "run0", [sys.executable, "-m", "megatron_patch"]
    yield "status of ten runs", [*patch, "status", "--runs", str(folder)]
    yield "report", [*patch, "report", str(run), "--evaluations", str(folder / "none")]
    yield "summary", [*patch, "summary", str(run), "--tokens", "8"]
    for name in LOOKS:
        yield name, [sys.executable, "-m", "benchmarks.run_size", "--look", name, "--run", str(run)]


def table(shares: list[float], costs: dict[str, list[tuple[float, float]]]) -> str:
    heads = [f"{round(s * STEPS):,} steps, {round(s * MILESTONES)} milestones" for s in shares]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, row in costs.items():
        lines.append(f"| {name} | " + " | ".join(f"{seconds:.2f} s, {mb:,.0f} MB" for seconds, mb in row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("demo/run"), help="of `make demo`")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3, 1.0], help="of the real run's size")
    parser.add_argument("--folder", type=Path, help="where the runs are made (a temporary folder)")
    parser.add_argument("--out", type=Path, help="Markdown")
    parser.add_argument("--look", choices=LOOKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.look:
        LOOKS[args.look](args.run)
        return
    costs: dict[str, list[tuple[float, float]]] = {}
    for share in args.shares:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            make_run(args.run, Path(name), share)
            for what, command in commands(Path(name)):
                costs.setdefault(what, []).append(measured(command))
                print(f"{share:g}: {what}: {costs[what][-1][0]:.2f} s", file=sys.stderr)
    text = table(args.shares, costs)
    print(text)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
