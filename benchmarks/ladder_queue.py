"""The ladder's queue: which runs there are, in which order, and one of them from its plateau to its last budget.

Any number of workers, on any number of machines that share the folder, take cases from one queue: whoever holds a
case's lock works at it, and what is finished has a `result.json`. Killed anywhere, the same command goes on.

    OUT/protocol.json                     what is compared; another protocol is refused in this folder
    OUT/shared-seed_1/result.json         held-out losses by steps, when the case is done
    OUT/shared-seed_1/main/               its run folder: warm-up, plateau, and the decay of the last budget
    OUT/shared-seed_1/to_000128/          the decay of an earlier budget, from the plateau's checkpoint
    OUT/shared-rate_0.004/                a run of the sweep
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_tools.files.durable import FolderBusy, folder_lock, write_whole
from data_tools.files.json_file import canonical_json, read_json
from megatron_patch import recipe
from megatron_patch.model import counts
from megatron_patch.run.log import accepted_backwards

REFERENCE = "shared"
RESULT = "result.json"
MOST_RATES = 8
_LOOK = 2.0  # seconds between two looks for a case whose turn has come


class LadderError(RuntimeError):
    """The ladder cannot go on: says which run, and what to do."""


class Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    arms: tuple[str, ...]
    seeds: tuple[int, ...]


class Protocol(BaseModel):
    """A size of benchmarks/ladder.yaml, which says what its keys mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    settings: tuple[str, ...]
    tokens: tuple[int, ...] = Field(min_length=1)
    cooldown: float = Field(gt=0, lt=1)
    rates: tuple[float, ...] = Field(min_length=1)
    sweep_seed: int
    queue: tuple[Stage, ...]


@dataclass(frozen=True)
class Case:
    """One arm with one seed and one peak learning rate, trained to every step count of `ends`."""

    name: str
    arm: str
    seed: int
    rate: float
    ends: tuple[int, ...]


class Ladder:
    """A protocol with its folder. `start` makes the processes that train: forked ones begin at once, on a CPU only."""

    def __init__(self, protocol: Protocol, data: Path, out: Path, commit: str, start: BaseContext) -> None:
        """Raises LadderError where `out` holds another protocol, RecipeError where an arm's recipe is refused."""
        self.protocol, self.out = protocol, out
        self._data, self._commit, self._start = data, commit, start
        self.arms = tuple(dict.fromkeys(arm for stage in protocol.queue for arm in stage.arms))
        self.recipes = {arm: recipe.load(self._file(arm), self._settings()) for arm in {REFERENCE, *self.arms}}
        self._keep_protocol()

    def _file(self, arm: str) -> Path:
        return recipe.RECIPES / "ladder" / f"{arm}.yaml"

    def _settings(self) -> list[str]:
        return [*self.protocol.settings, f"data.folder={self._data}"]

    def _keep_protocol(self) -> None:
        """Whoever comes first writes it; one that differs would compare what cannot be compared."""
        path = self.out / "protocol.json"
        mine: dict[str, Any] = {
            "protocol": self.protocol.model_dump(mode="json"),
            "arms": {arm: r.model_dump(mode="json", exclude={"data"}) for arm, r in sorted(self.recipes.items())},
            "data": hashlib.sha256((self._data / "manifest.json").read_bytes()).hexdigest(),
        }
        with folder_lock(self.out, "protocol.lock", wait=True):
            if not path.exists():
                write_whole(path, canonical_json(mine))
            elif read_json(path, "use another --out") != mine:
                raise LadderError(f"{path}: was begun with another protocol, recipe or data set; use another --out")

    def tokens_a_step(self, arm: str) -> int:
        return self.recipes[arm].batch.global_batch_size * self.recipes[arm].model.sequence_length

    def flops_per_token(self, arm: str) -> int:
        return counts.flops_per_token(self.recipes[arm].model)

    def steps(self, arm: str, tokens: int, meets: str) -> int:
        """Steps of an arm that meet `shared` with so many tokens: at equal `tokens`, or at equal `FLOPs`."""
        share = self.flops_per_token(REFERENCE) / self.flops_per_token(arm) if meets == "FLOPs" else 1.0
        return round(tokens * share / self.tokens_a_step(arm))

    def _ends(self, arm: str) -> tuple[int, ...]:
        return tuple(sorted({self.steps(arm, t, meets) for t in self.protocol.tokens for meets in ("tokens", "FLOPs")}))

    def result(self, case: Case) -> dict[str, Any] | None:
        """What a finished case reached; None where it is not finished."""
        path = self.out / case.name / RESULT
        return read_json(path, f"remove {path.parent}") if path.exists() else None

    def sweep(self, arm: str) -> tuple[float | None, list[Case]]:
        """(the best rate, none to do), or (None, the runs that are to be done before it is known)."""
        rates, end = sorted(self.protocol.rates), self.steps(arm, self.protocol.tokens[0], "tokens")
        if len(rates) == 1:
            return rates[0], []
        while True:
            cases = [Case(f"{arm}-rate_{rate:g}", arm, self.protocol.sweep_seed, rate, (end,)) for rate in rates]
            results = [self.result(case) for case in cases]
            if missing := [case for case, result in zip(cases, results, strict=True) if result is None]:
                return None, missing
            losses = [math.inf if (loss := r["losses"][str(end)]) is None else loss for r in results if r]
            at = losses.index(min(losses))
            if 0 < at < len(rates) - 1 or len(rates) >= MOST_RATES:
                return rates[at], []
            rates = [rates[0] / 2, *rates] if at == 0 else [*rates, rates[-1] * 2]

    def cases(self) -> list[Case]:
        """Every case whose turn can come by now, in the order of the queue, the finished ones too."""
        found: list[Case] = []
        for stage in self.protocol.queue:
            best = {arm: self.sweep(arm) for arm in stage.arms}
            found += [case for _, missing in best.values() for case in missing]
            for seed in stage.seeds:
                for arm, (rate, _) in best.items():
                    if rate is not None:
                        found.append(Case(f"{arm}-seed_{seed}", arm, seed, rate, self._ends(arm)))
        return found

    @property
    def planned(self) -> int:
        """Reported cases, those of the sweep left out."""
        return sum(len(stage.arms) * len(stage.seeds) for stage in self.protocol.queue)

    def work(self) -> None:
        """Take cases until none is left. Raises LadderError where a run fails or was stopped."""
        while True:
            waiting = [case for case in self.cases() if self.result(case) is None]
            if not waiting:
                return
            for case in waiting:
                with contextlib.suppress(FolderBusy), folder_lock(self.out / case.name):
                    if self.result(case) is None:
                        self._run(case)
                    break
            else:  # others are at them, and more may come of what they find
                time.sleep(_LOOK)

    def _run(self, case: Case) -> None:
        began, folder = time.time(), self.out / case.name
        main, last = folder / "main", case.ends[-1]
        losses: dict[str, float | None] = {}
        for end in case.ends[:-1]:
            branch = folder / f"to_{end:06d}"
            if not (branch / "log.jsonl").exists() or end not in _held_out(branch):
                self._train(case, main, _plateau_end(end, self.protocol), last, ["data.held_out_interval=0"])
                _branch_off(main, _plateau_end(end, self.protocol), branch)
                self._train(case, branch, end, end, ["--accept-changes"])
            losses[str(end)] = _held_out(branch)[end]
            shutil.rmtree(branch / "checkpoints", ignore_errors=True)
        losses[str(last)] = self._train(case, main, last, last, [])
        result = {"arm": case.arm, "seed": case.seed, "rate": case.rate, "losses": losses, "commit": self._commit}
        write_whole(folder / RESULT, canonical_json({**result, "ended": round(time.time())}))
        done = sum(1 for _ in self.out.glob(f"*/{RESULT}"))
        said = ", ".join(f"step {end} {'diverged' if loss is None else f'{loss:.4f}'}" for end, loss in losses.items())
        print(f"{done} cases done, {case.name} in {time.time() - began:.0f} s: {said}", flush=True)

    def _train(self, case: Case, run: Path, stop: int, end: int, more: list[str]) -> float | None:
        """The repository's own `train` up to step `stop` of a schedule that ends at `end`; its held-out loss there."""
        cooldown = end - _plateau_end(end, self.protocol)
        words = [
            *("train", str(self._file(case.arm)), *self._settings(), f"seed={case.seed}"),
            *(f"data.order_seed={case.seed}", f"run.folder={run}", f"run.steps={stop}"),
            *(f"optimizer.learning_rate={case.rate}", f"optimizer.decay_steps={end}"),
            *(f"optimizer.cooldown_steps={cooldown}", *more),
        ]
        log = self.out / case.name / "output.txt"
        process: Any = self._start.Process(target=_train, args=(words, log))  # type: ignore[attr-defined]
        process.start()
        try:
            process.join()
        finally:
            process.terminate()  # which leaves a checkpoint of where it is
            process.join()
        losses = _held_out(run)
        if process.exitcode == 0 and (stop in losses or "data.held_out_interval=0" in more):
            return losses.get(stop)
        if process.exitcode == 1 and case.seed == self.protocol.sweep_seed and _diverged(run):
            return None
        raise LadderError(
            f"{case.name}: exit code {process.exitcode} on the way to step {stop}; {log} says why. The same command "
            "goes on from the last checkpoint"
        )


def _plateau_end(end: int, protocol: Protocol) -> int:
    return end - max(1, round(end * protocol.cooldown))


def _held_out(run: Path) -> dict[int, float | None]:
    """Held-out losses that a run has logged, by step."""
    if not (run / "log.jsonl").exists():
        return {}
    return {r["step"]: r["held_out_loss"] for r in accepted_backwards(run / "log.jsonl") if "held_out_loss" in r}


def _diverged(run: Path) -> bool:
    newest: dict[str, Any] = next(iter(accepted_backwards(run / "log.jsonl")), {})
    return "watchdog" in newest


def _branch_off(main: Path, step: int, branch: Path) -> None:
    """A run folder that goes on from a checkpoint of another one; its files are links."""
    if branch.exists():
        return
    partial = branch.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    name = f"step_{step:08d}"
    shutil.copytree(main / "checkpoints" / name, partial / "checkpoints" / name, copy_function=os.link)
    partial.rename(branch)


def _train(words: list[str], log: Path) -> None:
    """In a process of its own: `python -m megatron_patch train ...` on one core, what it prints added to `log`."""
    stream = log.open("a", buffering=1)
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout = sys.stderr = stream
    import torch

    from megatron_patch.__main__ import main

    torch.set_num_threads(1)
    sys.exit(main(words))


def every_result(ladder: Ladder) -> Iterator[tuple[Case, dict[str, Any]]]:
    """The finished cases of the queue, the sweep's not."""
    for case in ladder.cases():
        if "-seed_" in case.name and (result := ladder.result(case)) is not None:
            yield case, result
