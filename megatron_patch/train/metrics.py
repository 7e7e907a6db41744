"""The numbers of a step: one line that a human can read, and the record that every logger gets."""

from __future__ import annotations

import math
import time
from collections import deque
from datetime import timedelta
from typing import Any

from megatron_patch.launch import say
from megatron_patch.model import counts
from megatron_patch.parallel import device
from megatron_patch.recipe import Recipe, RecipeError
from megatron_patch.train.loggers import event_files, service
from megatron_patch.train.loggers.json_lines import JsonLines
from megatron_patch.train.loggers.logger import Logger
from megatron_patch.train.note import note


def check_loggers(recipe: Recipe) -> None:
    """Raises RecipeError where the recipe names a service whose library is not installed."""
    if missing := [name for name in recipe.run.loggers if not service.is_installed(name)]:
        raise RecipeError(
            f"run.loggers: {', '.join(missing)} is not installed; `pip install {' '.join(missing)}` (`wandb` is pinned "
            "by the extra `loggers`), or leave it out of run.loggers"
        )


class Log:
    """Writes standard output and the recipe's loggers, log.jsonl first. Only rank 0 makes one.

    `tokens_per_second` is per job, over the time between the ends of two steps; MFU counts applied layers (causal, no
    recomputation, images by their average number) against the dense bf16 peak of all devices and is null where the peak
    is not known.
    """

    def __init__(
        self, recipe: Recipe, world_size: int, total_steps: int, done: int, images_per_row: float = 0.0
    ) -> None:
        """`done` is the step resumed from: what an attempt before logged beyond it is dropped, as it is done again.

        Raises DataError, as `step` and its like do, where the disk is full: a run without its log is not the run.
        """
        self._recipe, self._total_steps = recipe, total_steps
        self._tokens_a_step = recipe.batch.global_batch_size * recipe.model.sequence_length
        self._flops_per_token = counts.flops_per_row(recipe, images_per_row) / recipe.model.sequence_length
        peak = device.peak_flops()
        self._peak = None if peak is None else peak * world_size
        recipe.run_folder.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(recipe.run_folder / "log.jsonl", done)
        self._loggers: list[Logger] = [self._lines, *_others(recipe, done)]
        self._recent: deque[float] = deque(maxlen=50)
        self.tokens_per_second: float | None = None
        self.eta_seconds: float | None = None

    def step(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        seconds: float,
        joules: float = math.inf,
    ) -> None:
        """Log the finished 1-based `step`; loss in nats a token, `learning_rate` as used by it, `seconds` it took.

        `joules` are those of all GPUs; the record has none where they are not known (infinite).
        """
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
            **({"joules": joules} if math.isfinite(joules) else {}),
            "time": time.time(),
        }
        self._write(record)
        if step % self._recipe.run.log_interval == 0 or step == self._total_steps:
            left = timedelta(seconds=round(self.eta_seconds))
            share = "" if mfu is None else f"  MFU {mfu:.1%}"
            say(
                f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  tokens {record['tokens']:,}"
                f"  loss {loss:.4f}  grad norm {grad_norm:.3f}  lr {learning_rate:.2e}"
                f"  {rate:,.0f} tokens/s{share}  ETA {left}"
            )

    def held_out(self, step: int, loss: float) -> None:
        """Log a held-out loss (nats a token) after `step`."""
        self._write({"step": step, "held_out_loss": _finite(loss), "time": time.time()})
        say(f"step {step}  held-out loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):.1f}")

    def remarkable(self, step: int, reason: str, applied: bool, withheld: int, segment: int, rows: list[int]) -> None:
        """Log what the watchdog found about a step, with the row numbers of its batch in their segment.

        `withheld` counts the updates of the run that were withheld, this one included.
        """
        found = {"reason": reason, "applied": applied, "withheld": withheld, "segment": segment, "rows": rows}
        self._write({"step": step, "watchdog": found, "time": time.time()})
        note(
            f"step {step}: {reason}{'' if applied else f'; the update was withheld, {withheld} by now'}. Its rows of "
            f"segment {segment} are in log.jsonl"
        )

    def left_out(self, step: int, segment: int, rows: list[int]) -> None:
        """Log the rows of a segment that ends with `step` of which no batch was made."""
        self._write({"step": step, "left_out": {"segment": segment, "rows": rows}, "time": time.time()})
        note(f"segment {segment} is done: {len(rows)} of its rows make no whole batch and are left out (log.jsonl)")

    def missing(self) -> str:
        """What of log.jsonl is no longer at its path; empty where all is."""
        return self._lines.missing()

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()

    def _write(self, record: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.write(record)


def _others(recipe: Recipe, done: int) -> list[Logger]:
    folder = recipe.run_folder
    loggers: list[Logger] = []
    if recipe.run.tensorboard and event_files.is_installed():
        loggers.append(event_files.EventFiles(folder / "tensorboard", done))
    for name in recipe.run.loggers:
        try:
            loggers.append(service.ServiceProcess(name, folder, done))
        except OSError as error:
            note(f"run.loggers: {name} is left out of this attempt ({error})")
    return loggers


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
