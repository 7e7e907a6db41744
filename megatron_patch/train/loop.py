"""The training loop: `torchrun --nproc-per-node N -m megatron_patch train recipes/X.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from data_tools.files.durable import write_whole
from megatron_patch import launch, recipe
from megatron_patch.data.loader import BatchShard, Loader, held_out_shards
from megatron_patch.data.order import SampleOrder
from megatron_patch.data.segments import DataError, Segments, open_segments
from megatron_patch.data.sharding import micro_batches
from megatron_patch.kernels.choice import KernelError
from megatron_patch.parallel import device, topology
from megatron_patch.parallel.joules import EnergyCounter
from megatron_patch.recipe import Recipe, RecipeError
from megatron_patch.run.attempts import REFUSED
from megatron_patch.run.status_file import StatusFile
from megatron_patch.train import signals
from megatron_patch.train.alike import check_alike
from megatron_patch.train.checkpoint import CheckpointError
from megatron_patch.train.checkpoint.keeper import ONE_TRAINING, Keeper
from megatron_patch.train.checkpoint.resume import ResumeRefused
from megatron_patch.train.hang import HangWatch
from megatron_patch.train.images import check_images, images_of
from megatron_patch.train.metrics import Log, check_loggers
from megatron_patch.train.note import note
from megatron_patch.train.schedule import learning_rate
from megatron_patch.train.signals import Requests
from megatron_patch.train.step import Step, Trainer
from megatron_patch.train.watchdog import LossWatch, SlowWatch


class TrainingError(RuntimeError):
    """A run that had to stop: names the step, the rows of its batch and the remedy."""


def main(args: argparse.Namespace) -> int:
    """Train to the recipe's last step. Exit code 2: refused before the first step; 1: stopped by an error."""
    launch.setup_environment()
    launch.raise_file_limit()
    launch.bind_to_gpu(int(os.environ["LOCAL_RANK"]))
    is_first = os.environ["RANK"] == "0"
    status: StatusFile | None = None
    try:
        resolved = recipe.load(args.recipe, args.overrides)
        status = StatusFile(resolved.run_folder, int(os.environ["RANK"]))
        _check_run_folder(resolved.run_folder)
        check_loggers(resolved)
        data_size = topology.data_parallel_size(resolved.parallel, int(os.environ["WORLD_SIZE"]))
        segments = _open_data(resolved)
        order = SampleOrder(
            segments.num_segments,
            segments.rows_per_segment,
            resolved.batch.global_batch_size,
            seed=resolved.data.order_seed,
            epochs=resolved.data.epochs,
        )
        total_steps = _total_steps(resolved, order)
    except (RecipeError, DataError) as error:
        if is_first:
            launch.complain(f"refused: {error}")
            if status is not None:
                status.refuse(str(error))
        elif status is not None and os.environ["LOCAL_RANK"] == "0":  # its node may lack what the first one has
            text = f"refused on {platform.node()}: {error}"
            status.fail(text)
            launch.complain(text)
        return 2
    try:
        status.start(total_steps=total_steps, ranks=int(os.environ["WORLD_SIZE"]))
        if resolved.run.deterministic:
            device.make_deterministic()
        # The watch for hangs counts the time that ranks have lived, which collectives cannot.
        timeout = timedelta(days=1) if resolved.watchdog.hang_minutes else topology.TIMEOUT
        topology.join(resolved.parallel, timeout, signals.ends_waiting)
        check_alike(resolved, segments.digest)  # ranks of other layouts would wait for each other's groups
        place = topology.initialize(resolved.parallel, timeout)
        if is_first:
            tokens = total_steps * resolved.batch.global_batch_size * resolved.model.sequence_length
            layout = f"{place}, {total_steps:,} steps of {data_size} data-parallel ranks, {tokens:,} tokens"
            launch.say(f"{resolved.to_yaml()}# {layout}")
        _Attempt(resolved, place, segments, order, total_steps, args.accept_changes, status).run()
    except (TrainingError, CheckpointError, KernelError, RecipeError) as error:
        refused = isinstance(error, ResumeRefused | KernelError | RecipeError)
        if is_first or not isinstance(error, TrainingError):  # which every rank raises, and the first one knows most
            status.fail(REFUSED + str(error) if refused else str(error))
        if is_first:
            launch.complain(f"{'refused' if refused else 'stopped'}: {error}")
        return 2 if refused else 1
    except launch.LaunchError as error:
        status.fail(str(error))
        raise
    except launch.WaitEnded as error:
        status.end("stopped", str(error))
        launch.complain(f"stopped on rank {os.environ['RANK']}: {error}")
        return 1  # the launcher ends those that were not asked
    except DataError as error:  # a row that this rank alone has read
        status.fail(str(error))
        launch.complain(f"stopped on rank {os.environ['RANK']}: {error}")
        return 1
    except BaseException as error:
        if device.lost_peer(error):
            status.fail(f"another rank is gone; the launcher says how it ended ({error})")
            if is_first:
                launch.say(f"stopped: another rank is gone; why is above or in {status.path}", sys.stderr)
            return 1
        status.fail(f"{type(error).__name__}: {error}")
        if isinstance(error, SystemExit):  # of a library, in the loader's thread say: its 0 would be taken for success
            launch.complain(f"stopped on rank {os.environ['RANK']}: something called sys.exit({error.code!r})")
            return 1
        raise
    topology.destroy()
    return 0


def _check_run_folder(run: Path) -> None:
    """Raises RecipeError where something lies in the place of what the run writes; `resume` sees to checkpoints."""
    for name, kind, is_so in (
        ("log.jsonl", "plain file", Path.is_file),
        ("recipe.yaml", "plain file", Path.is_file),
        ("stacks", "folder", Path.is_dir),
    ):
        if (run / name).exists() and not is_so(run / name):
            raise RecipeError(f"{run / name}: is no {kind}; move it away, or choose another run.folder")


def _open_data(resolved: Recipe) -> Segments:
    if resolved.data.folder is None:
        raise RecipeError("data.folder: not set; name the folder that data_tools/build_amber.py wrote")
    segments = open_segments(
        resolved.data.folder,
        row_length=resolved.row_length,
        vocab_size=resolved.model.vocab_size,
        read_ahead=resolved.data.read_ahead,
        stage_folder=resolved.data.stage_folder,
        again=resolved.data.epochs > 1,
    )
    if resolved.data.reset_at_starts and not segments.is_marked:
        raise DataError(
            "holds rows of documents, in which no conversation begins",
            file=resolved.data.folder,
            remedy="set data.reset_at_starts=false, or name what data_tools/build_chat.py wrote",
        )
    check_images(resolved, segments)
    if resolved.data.held_out_interval and segments.held_out_rows < resolved.data.held_out_rows:
        raise DataError(
            f"{segments.held_out_rows} held-out rows, the recipe scores {resolved.data.held_out_rows}",
            file=resolved.data.folder,
            remedy="lower data.held_out_rows, or set data.held_out_interval=0",
        )
    return segments


def _total_steps(resolved: Recipe, order: SampleOrder) -> int:
    steps = resolved.run.steps or order.total_steps
    if steps > order.total_steps:
        raise DataError(
            f"holds {order.total_steps:,} steps of {resolved.batch.global_batch_size} rows "
            f"({order.steps_per_segment:,} a segment), the recipe asks for {steps:,}",
            file=resolved.data.folder or "",
            remedy="lower run.steps or batch.global_batch_size, or build more segments",
        )
    return steps


@dataclass
class _Queued:
    """A step whose work is queued, and whose numbers are read while the device computes the next one."""

    number: int  # from 1
    rate: float
    begun: device.Moment
    computed: device.Moment
    step: Step


class _Attempt:
    """The steps of one start of a run, every rank alike.

    The host stays up to a step ahead of the device. Step n's numbers are read when step n + 1 is computed and before
    its update is queued: whatever they ask for finds weights and moments as step n left them, and what was computed of
    step n + 1 can be dropped.
    """

    def __init__(
        self,
        resolved: Recipe,
        place: topology.Topology,
        segments: Segments,
        order: SampleOrder,
        total: int,
        accept_changes: bool,
        status: StatusFile,
    ) -> None:
        num_micro_batches = micro_batches(resolved, place.data_size)
        self._resolved, self._place, self._order, self._total, self._status = resolved, place, order, total, status
        self._requests = Requests(
            place.rank, place.world_size, resolved.checkpoint.interval_minutes, resolved.run.wall_minutes
        )
        self._hang = HangWatch(
            resolved.watchdog.hang_minutes, resolved.run_folder, place.rank, place.world_size, status
        )
        self._trainer = Trainer(resolved, place, num_micro_batches)
        self._keeper = Keeper(resolved, place, self._trainer.optimizer, order, total, status)
        self._hang.beat("resume")
        self._state = self._keeper.resume(segments.digest, accept_changes)
        status.resumed(step=self._state.step, samples=self._state.samples, tokens=self._state.tokens)
        if place.rank == 0:
            write_whole(resolved.run_folder / "recipe.yaml", resolved.to_yaml().encode())
        withheld = self._state.step - self._state.optimizer_step
        self._losses = LossWatch(resolved.watchdog, self._state.spike_window, self._state.withheld, withheld)
        self._slow = SlowWatch(resolved.watchdog.slow_factor)
        sharding: dict[str, Any] = {
            "data_parallel_rank": place.data_rank,
            "data_parallel_size": place.data_size,
            "micro_batch_size": resolved.batch.micro_batch_size,
            "num_micro_batches": num_micro_batches,
            "images": images_of(resolved, segments) if place.pipeline_rank == 0 else None,
        }
        rows = resolved.data.held_out_rows if resolved.data.held_out_interval else 0
        self._held_out = list(
            held_out_shards(segments, num_rows=rows, global_batch_size=resolved.batch.global_batch_size, **sharding)
        )
        self._log = None
        if place.rank == 0:
            self._log = Log(resolved, place.world_size, total, self._state.step, segments.manifest.images_in_a_row)
        self._loader = Loader(segments, order, samples_consumed=self._state.samples, **sharding)
        self._energy = EnergyCounter()
        self._last_end = device.Moment()
        self._stop: str | None = None
        self._gone = ""  # what of the run the first rank no longer finds at its path

    def run(self) -> None:
        """To the last step, or to the one after which any rank was asked to stop; that step's checkpoint is durable."""
        if self._state.step >= self._total and self._log:
            note(f"all {self._total} steps are done already; to go on, set run.steps above {self._state.step}")
        try:
            self._steps()
            self._hang.beat("last save")
            self._look()
            gone = self._keeper.finish(self._state, self._gone)
        finally:
            self._hang.close()
            self._loader.close()
            if self._log:
                self._log.close()
        step, withheld = self._state.step, self._losses.withheld
        if gone:
            place = self._status.path.parent
            raise TrainingError(
                f"{gone}; stopped after step {step}, whose checkpoint is in {place}/checkpoints. Start again with "
                f"run.folder={place} to go on"
            )
        if step >= self._total and 2 * withheld > step:
            raise TrainingError(
                f"all {step} steps are done, but {withheld} of their updates were withheld: the model has learnt from "
                "less than half of its rows. log.jsonl says why and which; mend the cause and train in another "
                "run.folder"
            )
        if step < self._total:
            self._status.end("stopped", f"{self._stop}; a checkpoint of step {step} is durable", step=step)
            if self._log:
                note(f"stopped after step {step}: {self._stop}; start the same command again to go on")
        else:
            beyond = f"; the run stands at step {step}" if step > self._total else ""
            lost = f"; {withheld} of their updates were withheld" if withheld else ""
            self._status.end("completed", f"all {self._total} steps are done{beyond}{lost}", step=step)

    def _steps(self) -> None:
        queued: _Queued | None = None
        if self._held_out and self._state.step == 0 and self._resolved.run.initial_weights is not None:
            self._score(0)  # what the training from here on is compared with
        for number in range(self._state.step + 1, self._total + 1):
            self._hang.beat(f"step {number}")
            begun = device.Moment()
            computed = self._trainer.compute(next(self._loader))
            if queued is not None:
                self._finish(queued)
                if self._stop is not None:
                    return
                self._hang.beat(f"step {number}")
            rate = learning_rate(number - 1, self._resolved.optimizer, self._total)
            step = self._trainer.update(rate, self._requests.number(), self._losses.ceiling, self._energy.since_last())
            queued = _Queued(number, rate, begun, computed, step)
            if number == self._total or self._is_scored(number):
                self._finish(queued)
                queued = None
            if self._stop is not None:
                return

    def _is_scored(self, number: int) -> bool:
        """A last step always is."""
        return bool(self._held_out) and (number == self._total or number % self._resolved.data.held_out_interval == 0)

    def _finish(self, queued: _Queued) -> None:
        """Read a step's numbers, log it and do what it asks for; before the next step's update is queued."""
        self._look()
        result = queued.step.result()
        self._losses.judge(result.loss, result.grad_norm, result.applied)
        self._report_loss(queued.number, result.applied)
        batch = self._resolved.batch.global_batch_size
        tokens = batch * self._resolved.model.sequence_length
        self._state = self._state.after_batch(batch, tokens, self._losses.window, self._losses.in_a_row)
        if self._log:
            seconds = queued.step.end.since(self._last_end)
            self._log.step(queued.number, result.loss, result.grad_norm, queued.rate, seconds, result.joules)
            if (rest := self._order.left_out(queued.number)) is not None:
                self._log.left_out(queued.number, rest[0], rest[1].tolist())
            self._status.progress(
                step=queued.number,
                samples=self._state.samples,
                tokens=self._state.tokens,
                loss=result.loss,
                tokens_per_second=self._log.tokens_per_second,
                eta_seconds=self._log.eta_seconds,
                withheld=self._losses.withheld,
            )
        self._last_end = queued.step.end
        if (verdict := self._slow.check(queued.computed.since(queued.begun))) is not None:
            note(f"step {queued.number}: rank {self._place.rank} on {platform.node()} {verdict}")
        decision = self._requests.decide(result.request)
        self._stop = decision.stop
        # Scored before it is saved: what is saved is not done again.
        if self._is_scored(queued.number) and (self._stop is None or queued.number == self._total):
            self._score(queued.number)
        self._hang.beat(f"save after step {queued.number}")
        if self._keeper.after_step(self._state, due=decision.save):
            self._requests.saved()

    def _look(self) -> None:
        """See whether the run is still at its path, and ask all ranks to stop where it is not (rank 0).

        Raises TrainingError where another training has the folder: nothing more may be written there.
        """
        if not self._log:
            return
        self._gone = self._gone or self._status.look() or self._log.missing() or self._keeper.missing()
        if self._gone:
            self._requests.stop(self._gone)
            if taken := self._status.lock.taken:
                raise TrainingError(f"{self._gone}; {taken}. Step {self._state.step} is not saved: {ONE_TRAINING}")

    def _report_loss(self, number: int, applied: bool) -> None:
        """Log what the watchdog found. Raises TrainingError where the run must stop, the step before being saved."""
        if self._losses.action == "go on":
            return
        segment, rows = self._order.batch(self._state.samples)
        losses = self._losses
        if self._log:
            self._log.remarkable(number, losses.reason, applied, losses.withheld, segment, rows.tolist())
        if self._losses.action == "stop":
            self._hang.beat("saving the last good step")
            self._keeper.finish(self._state)
            in_a_row = len(losses.in_a_row) if losses.at_limit else 0
            raise _stopped(number, losses.reason, in_a_row, segment, rows.tolist())

    def _score(self, number: int) -> None:
        shards = _beating(self._held_out, self._hang, number)
        loss = self._trainer.held_out_loss(shards, sum(shard.labels for shard in self._held_out))
        if self._log:
            self._log.held_out(number, loss)
        self._last_end = device.Moment()  # its time is not the next step's


def _beating(shards: Iterable[BatchShard], hang: HangWatch, step: int) -> Iterator[BatchShard]:
    for shard in shards:
        hang.beat(f"held-out loss after step {step}")
        yield shard


def _stopped(step: int, reason: str, in_a_row: int, segment: int, rows: list[int]) -> TrainingError:
    """`in_a_row`: updates after which skipping ended; 0 where nothing is skipped."""
    before = f"those of the {in_a_row - 1} steps before are in log.jsonl. " if in_a_row > 1 else ""
    remedy = (
        f"{before}Where they are sound, the weights are not: move the checkpoints since away and go on from an earlier "
        "one with a lower optimizer.learning_rate. To skip more, raise watchdog.skip_limit"
        if in_a_row
        else "or resume with watchdog.non_finite=skip watchdog.spike=skip"
    )
    return TrainingError(
        f"step {step}: {reason}; the update was not made, the step before is saved. Its batch is segment {segment}, "
        f"rows {rows}. Look at those rows (python data_tools/build_amber.py verify), {remedy}"
    )
