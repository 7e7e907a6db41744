"""One line a step that a human can read, the same as JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from data_tools.files.durable import full_disk_named, write_whole
from megatron_patch.model import counts
from megatron_patch.parallel import device
from megatron_patch.recipe import Recipe
from megatron_patch.run.log import records


class Log:
    """Writes RUN/log.jsonl, standard output and event files. Only rank 0 makes one.

    `tokens_per_second` is per job, over the time between the ends of two steps; MFU counts applied layers (causal, no
    recomputation) against the dense bf16 peak of all devices and is null where the peak is not known.
    """

    def __init__(self, recipe: Recipe, world_size: int, total_steps: int, done: int) -> None:
        """`done` is the step resumed from: what an attempt before logged beyond it is dropped, as it is done again.

        Raises DataError, as `step` and its like do, where the disk is full: a run without its log is not the run.
        """
        self._recipe, self._total_steps = recipe, total_steps
        self._tokens_a_step = recipe.batch.global_batch_size * recipe.model.sequence_length
        self._flops_per_token = counts.flops_per_token(recipe.model)
        peak = device.peak_flops()
        self._peak = None if peak is None else peak * world_size
        recipe.run_folder.mkdir(parents=True, exist_ok=True)
        self._path = recipe.run_folder / "log.jsonl"
        _keep_until(done, self._path)
        self._lines = self._path.open("ab")
        self._events = _summary_writer(recipe.run_folder / "tensorboard", done) if recipe.run.tensorboard else None
        self._recent: deque[float] = deque(maxlen=50)
        self.tokens_per_second: float | None = None
        self.eta_seconds: float | None = None

    def step(self, step: int, loss: float, grad_norm: float, learning_rate: float, seconds: float) -> None:
        """Log the finished 1-based `step`; loss in nats a token, `learning_rate` as used by it, `seconds` it took."""
        self._recent.append(seconds)
        rate = self.tokens_per_second = self._tokens_a_step / seconds
        self.eta_seconds = sum(self._recent) / len(self._recent) * (self._total_steps - step)
        mfu = None if self._peak is None else rate * self._flops_per_token / self._peak
        record = {
            "step": step,
            "samples": step * self._recipe.batch.global_batch_size,
            "tokens": step * self._tokens_a_step,
            "loss": _finite(loss),
            "grad_norm": _finite(grad_norm),
            "learning_rate": learning_rate,
            "seconds": seconds,
            "tokens_per_second": rate,
            "mfu": mfu,
            "memory": device.peak_memory(),
            "time": time.time(),
        }
        self._write(record)
        if step % self._recipe.run.log_interval == 0 or step == self._total_steps:
            left = timedelta(seconds=round(self.eta_seconds))
            share = "" if mfu is None else f"  MFU {mfu:.1%}"
            print(
                f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  tokens {record['tokens']:,}"
                f"  loss {loss:.4f}  grad norm {grad_norm:.3f}  lr {learning_rate:.2e}"
                f"  {rate:,.0f} tokens/s{share}  ETA {left}",
                flush=True,
            )

    def held_out(self, step: int, loss: float) -> None:
        """Log a held-out loss (nats a token) after `step`."""
        self._write({"step": step, "held_out_loss": _finite(loss), "time": time.time()})
        print(f"step {step}  held-out loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):.1f}", flush=True)

    def remarkable(self, step: int, reason: str, applied: bool, segment: int, rows: list[int]) -> None:
        """Log what the watchdog found about a step, with the row numbers of its batch in their segment."""
        found = {"reason": reason, "applied": applied, "segment": segment, "rows": rows}
        self._write({"step": step, "watchdog": found, "time": time.time()})
        note(
            f"step {step}: {reason}{'' if applied else '; the update was withheld'}. Its rows of segment {segment} "
            "are in log.jsonl"
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a line that the disk did not take was an error when it was written
            self._lines.close()
        self._draw(lambda events: events.close())

    def _write(self, record: dict[str, Any]) -> None:
        with full_disk_named(self._path):
            self._lines.write(json.dumps(record).encode() + b"\n")
            self._lines.flush()
        scalars = [(key, v) for key, v in record.items() if isinstance(v, float) and key != "time"]
        self._draw(lambda events: [events.add_scalar(key, value, record["step"]) for key, value in scalars])

    def _draw(self, what: Callable[[Any], object]) -> None:
        """Do something with the event files, which are given up where they cannot be written: log.jsonl holds all."""
        if self._events is not None:
            try:
                what(self._events)
            except OSError as error:
                note(f"{self._events.log_dir}: cannot be written ({error}); no more event files in this attempt")
                self._events = None


def note(text: str) -> None:
    """A line for humans about something that is not a step."""
    print(text, file=sys.stderr, flush=True)


def _keep_until(step: int, lines: Path) -> None:
    """Drop records of later steps, a last line that a killed process left unfinished, and what is no record."""
    if not lines.exists():
        return
    kept = [json.dumps(record) + "\n" for record in records(lines) if record["step"] <= step]
    write_whole(lines, "".join(kept).encode())


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _summary_writer(folder: Path, done: int) -> Any:
    """None where tensorboard is not installed. Points of later steps than `done`, which are made again, are hidden."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=done + 1)
