"""One form in one process: speed, memory, and log-probabilities of given texts.

`python -m megatron_patch.devices.measure` reads a job as JSON and writes the answer as the last line of its output; a
process of its own, so that memory and threads are this form's alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_patch.devices.forms import find_form
from megatron_patch.devices.machine import energy_counters, joules_since, resident_bytes
from megatron_patch.devices.runtimes import Decoded, RuntimeFormError

SPEED_REPEATS = 3


@dataclass(frozen=True)
class Answer:
    """What a form did.

    Attributes:
        runtime: name and version.
        eos: id of the token that no continuation has.
        load_seconds, first_seconds: until the form was open; until the first new token of the first prompt.
        tokens_per_second: decoding, after that first token; the median of three.
        cpu_seconds: processor time of a decoded token, all threads.
        joules: energy of a decoded token; None where the machine does not tell.
        resident: bytes of the process after decoding.
        continued: greedy ids after each prompt.
        log_probs: of each id of each row after its first.
    """

    runtime: str
    eos: int
    load_seconds: float
    first_seconds: float
    tokens_per_second: float
    cpu_seconds: float
    joules: float | None
    resident: int
    continued: list[list[int]]
    log_probs: list[list[float]]


def measure(
    path: Path,
    threads: int,
    exact: bool,
    new_tokens: int,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Sequence[int]],
) -> Answer:
    """Opens the form in a process of its own and asks it; `exact`: with as little rounding as the runtime can.

    Raises RuntimeFormError with what the process said.
    """
    job = {
        "path": str(path), "threads": threads, "exact": exact, "new_tokens": new_tokens, "prompts": prompts,
        "rows": rows,
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    asked = subprocess.run(
        [sys.executable, "-m", __spec__.name], input=json.dumps(job), capture_output=True, text=True, env=environment
    )
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or [f"its process ended with {asked.returncode}"]
        raise RuntimeFormError(said[-1].removeprefix("refused: "))
    return Answer(**json.loads(asked.stdout.splitlines()[-1]))


def _answer(job: dict[str, Any]) -> Answer:
    prompts, rows, count = job["prompts"], job["rows"], job["new_tokens"]
    form = find_form(Path(job["path"]))
    began = time.perf_counter()
    context = max(len(ids) for ids in [*rows, *(p + [0] * count for p in prompts)]) + 8
    runtime = form.open(job["threads"], context, job["exact"])
    load = time.perf_counter() - began
    runtime.greedy(prompts[0], 2)  # pages of a mapped file come in here
    once = _costs(lambda: runtime.greedy(prompts[0], 1))
    decoded: list[Decoded] = []
    whole = _costs(lambda: decoded.extend(runtime.greedy(prompts[0], count) for _ in range(SPEED_REPEATS)))
    processor, joules = (
        None if all_ is None or one is None else (all_ - SPEED_REPEATS * one) / (SPEED_REPEATS * (count - 1))
        for all_, one in zip(whole, once, strict=True)
    )
    assert processor is not None
    resident = resident_bytes()
    return Answer(
        runtime=runtime.name,
        eos=runtime.eos,
        load_seconds=load,
        first_seconds=statistics.median(d.first for d in decoded),
        tokens_per_second=statistics.median((count - 1) / d.rest for d in decoded),
        cpu_seconds=processor,
        joules=joules,
        resident=resident,
        continued=[runtime.greedy(prompt, count).ids for prompt in prompts],
        log_probs=[runtime.log_probs(row) for row in rows],
    )


def _costs(work: Callable[[], object]) -> tuple[float | None, float | None]:
    """Processor seconds of all threads, and joules."""
    energy, processor = energy_counters(), time.process_time()
    work()
    return time.process_time() - processor, joules_since(energy)


if __name__ == "__main__":
    try:
        print("\n" + json.dumps(asdict(_answer(json.load(sys.stdin)))))
    except RuntimeFormError as error:
        sys.exit(f"refused: {error}")
    except ModuleNotFoundError as error:
        extra = "executorch" if str(error.name).startswith("executorch") else "devices"
        sys.exit(f"refused: {error.name} is not installed; pip install -e '.[{extra}]'")
