"""Speed on one GPU: tokens/s, share of the measured matmul ceiling, memory, where the time goes, and against peers.

    python -m benchmarks.gpu [--out FOLDER] [--minutes 8.5]     or: make bench-gpu

Measures the ceilings of the card, the 0.5B, 0.8B and large-base at rising micro-batches until memory ends, the peers
at the 0.5B's shape, and every kernel in each of its implementations, all in one run so that ratios share the card, its
clocks and its libraries. What matters least comes last. A case that does not end within its time is reported as such
and the next begins; `--minutes` count from the start of the process. Each row is printed as it is measured, and
FOLDER/gpu_DEVICE_DATE.json and .md are written after every case; the tables are printed at the end, whatever ends it:
the time, Ctrl-C, SIGTERM, or a call that never returns.
`--small` runs everything at a toy size, on a CPU too: a test of this script, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import STARTED, kernels, measure, peers
from benchmarks.table import MODELS, NOT_DETERMINISTIC, table
from data_tools.files.durable import write_whole
from megatron_patch.data.loader import BatchShard
from megatron_patch.kernels import choice, registry
from megatron_patch.launch import setup_environment
from megatron_patch.model import counts
from megatron_patch.parallel import device, topology
from megatron_patch.plan.memory import Place, memory
from megatron_patch.recipe import Recipe, load
from megatron_patch.train.step import Trainer

ROWS_A_STEP = 32
WARMUP, REPEATS = 1, 3  # steps of a case, whose ROWS_A_STEP rows take a good second
GRACE = 15  # seconds past its time after which the benchmark ends from beside a call that does not return
SMALL = [
    *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4"),
    *("model.vocab_size=512", "model.sequence_length=32", "kernels=reference"),
]


class Benchmark:
    def __init__(self, out: Path, minutes: float, small: bool) -> None:
        self.small = small
        self.deadline = time.monotonic() + 60 * minutes
        self.micro_batches = (1, 2) if small else (4, 8, 16, 32)
        self.rows = 4 if small else ROWS_A_STEP
        now = datetime.now(UTC)
        self.results: dict[str, Any] = {
            "date": now.isoformat(timespec="seconds"),
            "commit": measure.commit(),
            "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
            "device": device.name(),
            "gpus": 1 if device.HAS_GPU else 0,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cases": [],
            "breakdowns": [],
            "kernels": [],
            "notes": [],
        }
        out.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in device.name().lower())
        self.file = out / f"gpu_{name}_{now:%Y-%m-%d}{'_small' if small else ''}.json"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def attempt(self, what: str, limit: float, function: Callable[[], Any]) -> bool:
        """Run a case within `limit` seconds and what is left; a failure becomes a note. True: it ran."""
        start = time.monotonic()
        try:
            if self.left() <= 0:
                raise measure.TimeIsUp("not run: the benchmark's time is up")
            with measure.time_limit(min(limit, self.left())):
                function()
            return True
        except torch.OutOfMemoryError:
            self.note(f"{what}: out of memory")
        except measure.TimeIsUp as error:
            self.note(f"{what}: {error}")
        except Exception as error:
            traceback.print_exc()
            self.note(f"{what}: failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        finally:
            print(f"# {what}: {time.monotonic() - start:.1f} s, {self.left():.0f} s left", flush=True)
            self.write()
        return False

    def give_up(self) -> None:
        """End the process from another thread, with all that was measured: the first one is stuck in a call."""
        self.note("ended from outside: the case that ran then did not return")
        self.write()
        print(table(self.results), flush=True)
        os._exit(1)

    def note(self, text: str) -> None:
        self.results["notes"].append(text)

    def write(self) -> None:
        write_whole(self.file, (json.dumps(self.results, indent=1) + "\n").encode())
        write_whole(self.file.with_suffix(".md"), table(self.results).encode())

    def add_case(self, name: str, micro_batch: int, recipe: Recipe, seconds: float, **extra: Any) -> None:
        tokens = self.rows * recipe.model.sequence_length
        flops = tokens / seconds * counts.flops_per_token(recipe.model)
        self.results["cases"].append(
            {
                "name": name,
                "micro_batch": micro_batch,
                "tokens_per_second": tokens / seconds,
                "flops": flops,
                "share_of_ceiling": flops / self.results["ceilings"]["matmul_flops"],
                "peak_memory": device.peak_memory(),
                **extra,
            }
        )
        print(json.dumps(self.results["cases"][-1]), flush=True)

    def ceilings(self) -> None:
        size, copied = (256, 2**20) if self.small else (8192, 2**32)
        self.results["ceilings"] = measure.ceilings(size, copied)
        if device.HAS_GPU:
            self.results["weight_gradients_by"] = choice.choose_weight_gradient(device.current())

    def model(self, name: str) -> None:
        """Our training step of one recipe, at every micro-batch, then a breakdown at the fastest."""
        recipe = self.recipe(name)
        if recipe.run.deterministic:
            device.make_deterministic()
        place = topology.initialize(recipe.parallel)
        trainer = Trainer(recipe, place, self.rows)
        if trainer.recipe.kernels == "auto":
            self.results["chosen_kernels"] = registry.in_use()
        try:
            self.our_cases(name, trainer)
        finally:
            free(trainer)
            torch.use_deterministic_algorithms(False)  # peers run at their fastest

    def our_cases(self, name: str, trainer: Trainer) -> None:
        recipe = trainer.recipe
        fastest, shortest = None, float("inf")
        for micro_batch in self.micro_batches:
            shard = self.shard(recipe, micro_batch)

            def run(micro_batch: int = micro_batch, shard: BatchShard = shard) -> None:
                nonlocal fastest, shortest
                _reset_peak()
                trainer.optimizer.micro_batches = len(shard.rows)
                seconds = measure.seconds_a_call(lambda: queue_step(trainer, shard), warmup=WARMUP, repeats=REPEATS)
                planned = memory(Place(self.recipe(name, micro_batch), data_size=1, stage=0)).total
                held = state_bytes(trainer)
                self.add_case(name, micro_batch, recipe, seconds, state_bytes=held, planned_memory=planned)
                if seconds < shortest:
                    fastest, shortest = shard, seconds

            if not self.attempt(f"{name}, micro-batch {micro_batch}", 40, run):
                break
        if fastest is not None:
            shard = fastest
            free_bits = name + NOT_DETERMINISTIC
            self.attempt(f"{name}, breakdown", 40, lambda: self.breakdown(name, trainer, shard, shortest))
            self.attempt(f"{name}, host waits", 20, lambda: self.synchronisations(name, trainer, shard))
            self.attempt(f"{name}, run to run", 20, lambda: self.run_to_run(name, trainer))
            self.attempt(free_bits, 30, lambda: self.not_deterministic(free_bits, trainer, shard))

    def breakdown(self, name: str, trainer: Trainer, shard: BatchShard, seconds: float) -> None:
        optimizer = trainer.optimizer
        for method in ("clear_gradients", "reduce_gradients", "local_norm_squared", "step"):
            setattr(optimizer, method, _ranged(getattr(optimizer, method)))
        parts, longest = measure.breakdown(lambda: queue_step(trainer, shard), trainer.recipe.model)
        case = {"name": name, "micro_batch": shard.tokens.shape[1], "step_seconds": seconds}
        self.results["breakdowns"].append({**case, **parts, "longest_kernels": longest})

    def run_to_run(self, name: str, trainer: Trainer) -> None:
        """Are loss and gradients the same bits twice? At the smallest micro-batch, beside which a copy fits."""
        shard = self.shard(trainer.recipe, self.micro_batches[0])

        def answer() -> list[torch.Tensor]:
            trainer.optimizer.clear_gradients()
            loss = trainer._run(shard, self.rows * trainer.recipe.model.sequence_length, forward_only=False)
            return [loss, *(buffer.flat for buffer in trainer.optimizer.buffers)]

        trainer.optimizer.micro_batches = len(shard.rows)
        first = [tensor.clone() for tensor in answer()]
        same = all(torch.equal(a, b) for a, b in zip(first, answer(), strict=True))
        self.results.setdefault("bit_equal_run_to_run", {})[name] = same

    def not_deterministic(self, name: str, trainer: Trainer, shard: BatchShard) -> None:
        """What the same bits from run to run cost."""
        torch.use_deterministic_algorithms(False)
        _reset_peak()
        trainer.optimizer.micro_batches = len(shard.rows)
        seconds = measure.seconds_a_call(lambda: queue_step(trainer, shard), warmup=WARMUP, repeats=REPEATS)
        self.add_case(name, shard.tokens.shape[1], trainer.recipe, seconds)

    def synchronisations(self, name: str, trainer: Trainer, shard: BatchShard) -> None:
        """How often a step makes the host wait for the GPU: never, is what it should be."""
        if not device.HAS_GPU:
            return
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                queue_step(trainer, shard)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchronizing" in str(w.message)]
        self.results.setdefault("host_waits_a_step", {})[name] = len(waits)
        for wait in waits:
            self.note(f"{name}: the host waits at {Path(wait.filename).name}:{wait.lineno}")

    def peer(self, name: str, build: Callable[[Recipe], peers.Step], micro_batches: tuple[int, ...]) -> None:
        recipe = self.recipe("mobillama_05b")
        step = build(recipe)
        for micro_batch in micro_batches:
            tokens = torch.from_numpy(self.shard(recipe, micro_batch).tokens[..., :-1].astype(np.int64))
            tokens = tokens.to(device.current())

            def run(micro_batch: int = micro_batch, tokens: torch.Tensor = tokens) -> None:
                _reset_peak()
                seconds = measure.seconds_a_call(lambda: step(tokens).item(), warmup=WARMUP, repeats=REPEATS)
                self.add_case(name, micro_batch, recipe, seconds)

            if not self.attempt(f"{name}, micro-batch {micro_batch}", 200, run):
                break

    def recipe(self, name: str, micro_batch: int = 1) -> Recipe:
        overrides = [f"batch.global_batch_size={self.rows}", f"batch.micro_batch_size={micro_batch}"]
        return load(f"recipes/{name}.yaml", [*overrides, *(SMALL if self.small else ["kernels=auto"])])

    def shard(self, recipe: Recipe, micro_batch: int) -> BatchShard:
        shape = (self.rows // micro_batch, micro_batch)
        tokens = np.random.RandomState(0).randint(0, recipe.model.vocab_size, (*shape, recipe.row_length))
        rows = np.arange(self.rows).reshape(shape)
        return BatchShard(0, 0, rows, tokens.astype(np.uint16), np.ones(shape, np.float32), tokens[..., 1:].size)

    def run(self) -> None:
        self.attempt("ceilings", 60, self.ceilings)
        if "ceilings" not in self.results:
            raise SystemExit("the ceilings could not be measured: nothing else means anything")
        for name in MODELS:
            self.attempt(name, 150, lambda name=name: self.model(name))
            measure.release()
        sizes, recipe = self.micro_batches, self.recipe(MODELS[0])
        ours = kernels.Kernels(recipe, self.results, self.small)
        fast = ("reference", "triton") if device.HAS_GPU else ("reference",)
        eager, compiled, stock = "HF Llama, SDPA, eager", "HF Llama, SDPA, torch.compile", "mcore local spec"
        cases: list[tuple[str, float, Callable[[], None]]] = [
            (eager, 60, lambda: self.peer(eager, lambda r: peers.hugging_face(r, compiled=False), sizes[1:])),
            (stock, 60, lambda: self.peer(stock, peers.megatron_core, (1,) if self.small else (1, 2))),
            ("kernels", 30, lambda: ours.ours(*fast)),
            ("attention and weight gradient", 30, ours.libraries),
            # Compilation takes what time is left.
            (compiled, 240, lambda: self.peer(compiled, lambda r: peers.hugging_face(r, compiled=True), sizes[1:3])),
        ]
        if device.HAS_GPU:
            cases.append(("compiled kernels", 60, lambda: ours.ours("compiled")))
        for name, limit, case in cases:
            self.attempt(name, limit, case)
            measure.release()


def queue_step(trainer: Trainer, shard: BatchShard) -> None:
    """A step as the training loop runs it: its numbers are not waited for."""
    trainer.compute(shard)
    trainer.update(1e-5)


def state(trainer: Trainer) -> list[torch.Tensor]:
    """Weights, fp32 gradients, master weights and both moments that this rank holds, flat."""
    o = trainer.optimizer
    moments = [o.moments(group) for group in range(len(o.groups))]
    return [
        *(*o.flat_weights, *o.master_shards, *(buffer.flat for buffer in o.buffers)),
        *(m[which] for m in moments for which in ("exp_avg", "exp_avg_sq") if which in m),
    ]


def state_bytes(trainer: Trainer) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state(trainer)}.values())


def free(trainer: Trainer) -> None:
    """Give the state's memory back at once: DeepSpeed ties each parameter to itself, and its cycles outlive it."""
    for tensor in state(trainer):
        tensor.untyped_storage().resize_(0)


def _ranged(method: Callable[..., Any]) -> Callable[..., Any]:
    def with_range(*args: Any) -> Any:
        with torch.profiler.record_function("optimizer"):
            return method(*args)

    return with_range


def _reset_peak() -> None:
    if device.HAS_GPU:
        torch.cuda.empty_cache()  # what the last case left in pieces, out of memory or not
        torch.cuda.reset_peak_memory_stats()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.5, help="all of it ends within this long")
    parser.add_argument("--small", action="store_true", help="a toy size, on any device: tests this script")
    args = parser.parse_args()
    if not device.HAS_GPU and not args.small:
        print("no GPU here; --small tests this script on a CPU", file=sys.stderr)
        return 2
    setup_environment()
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # a world of one, on a machine that may have no network
    importing = time.monotonic() - STARTED  # torch, Megatron and DeepSpeed, from a cold disk
    benchmark = Benchmark(args.out, args.minutes - importing / 60, args.small)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    last_resort = threading.Timer(benchmark.left() + GRACE, benchmark.give_up)
    last_resort.daemon = True
    last_resort.start()
    try:
        benchmark.run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        print(table(benchmark.results), flush=True)
    topology.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
