"""The training loop: `torchrun --nproc-per-node N -m megatron_patch train recipes/X.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_tools.durable import write_whole
from megatron_patch import device, launch, recipe, topology
from megatron_patch.data.deal import deal
from megatron_patch.data.loader import BatchShare, Loader, held_out_shares
from megatron_patch.data.order import SampleOrder
from megatron_patch.data.segments import DataError, Segments, open_segments
from megatron_patch.recipe import Recipe, RecipeError
from megatron_patch.train.checkpoint import CheckpointError
from megatron_patch.train.checkpoint.keeper import Keeper
from megatron_patch.train.checkpoint.resume import ResumeRefused
from megatron_patch.train.hang import HangWatch
from megatron_patch.train.metrics import Log, note
from megatron_patch.train.schedule import learning_rate
from megatron_patch.train.signals import Requests
from megatron_patch.train.status_file import StatusFile
from megatron_patch.train.step import Trainer
from megatron_patch.train.watchdog import LossWatch, SlowWatch


class TrainingError(RuntimeError):
    """A run that had to stop: names the step, the rows of its batch and the remedy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. batch.micro_batch_size=4")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although the recipe or the data set is not the checkpoint's; recorded in the checkpoints after",
    )


def main(args: argparse.Namespace) -> int:
    """Train to the recipe's last step. Exit code 2: refused before the first step; 1: stopped by an error."""
    launch.setup_environment()
    launch.bind_to_gpu(int(os.environ["LOCAL_RANK"]))
    is_first = os.environ["RANK"] == "0"
    status: StatusFile | None = None
    try:
        resolved = recipe.load(args.recipe, args.overrides)
        status = StatusFile(resolved.run_folder, int(os.environ["RANK"]))
        data_size = topology.data_parallel_size(resolved.parallel, int(os.environ["WORLD_SIZE"]))
        segments = _open_data(resolved)
        order = SampleOrder(
            segments.num_segments,
            segments.rows_per_segment,
            resolved.batch.global_batch_size,
            seed=resolved.data.order_seed,
        )
        total_steps = _total_steps(resolved, order)
    except (RecipeError, DataError) as error:
        if is_first:
            print(f"refused: {error}", file=sys.stderr)
        if status is not None:
            status.refuse(str(error))
        return 2
    status.start(total_steps=total_steps, ranks=int(os.environ["WORLD_SIZE"]))
    try:
        if resolved.run.deterministic:
            device.make_deterministic()
        place = topology.initialize(resolved.parallel)
        if is_first:
            layout = f"{place}, {total_steps:,} steps of {data_size} data-parallel ranks"
            print(f"{resolved.to_yaml()}# {layout}", flush=True)
        _train(resolved, place, segments, order, total_steps, args.accept_changes, status)
    except (TrainingError, CheckpointError) as error:
        status.fail(str(error))
        if is_first:
            print(f"stopped: {error}", file=sys.stderr)
        return 2 if isinstance(error, ResumeRefused) else 1
    except BaseException as error:
        status.fail(f"{type(error).__name__}: {error}")
        raise
    topology.destroy()
    return 0


def _open_data(resolved: Recipe) -> Segments:
    if resolved.data.folder is None:
        raise RecipeError("data.folder: not set; name the folder that data_tools/build_amber.py wrote")
    segments = open_segments(
        resolved.data.folder,
        row_length=resolved.row_length,
        vocab_size=resolved.model.vocab_size,
        read_ahead=resolved.data.read_ahead,
        stage_folder=resolved.data.stage_folder,
    )
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


def _train(
    resolved: Recipe,
    place: topology.Topology,
    segments: Segments,
    order: SampleOrder,
    total: int,
    accept_changes: bool,
    status: StatusFile,
) -> None:
    batch = resolved.batch
    multiple = resolved.parallel.pipeline if resolved.parallel.virtual_pipeline > 1 else 1
    micro_batches = deal(batch.global_batch_size, place.data_size, batch.micro_batch_size, multiple_of=multiple)
    requests = Requests(place.rank, place.world_size, resolved.checkpoint.interval_minutes, resolved.run.wall_minutes)
    hang = HangWatch(resolved.watchdog.hang_minutes, resolved.run_folder, place.rank, place.world_size, status)
    trainer = Trainer(resolved, place, micro_batches)
    keeper = Keeper(resolved, place, trainer.optimizer, order, status)
    hang.beat("resume")
    state = keeper.resume(segments.digest, accept_changes)
    status.progress(step=state.step, samples=state.samples, tokens=state.tokens)
    if place.rank == 0:
        write_whole(resolved.run_folder / "recipe.yaml", resolved.to_yaml().encode())
    losses = LossWatch(resolved.watchdog, state.spike_window)
    slow = SlowWatch(resolved.watchdog.slow_factor)
    held_out = list(
        held_out_shares(
            segments,
            num_rows=resolved.data.held_out_rows if resolved.data.held_out_interval else 0,
            global_batch_size=batch.global_batch_size,
            data_parallel_rank=place.data_rank,
            data_parallel_size=place.data_size,
            micro_batch_size=batch.micro_batch_size,
            num_micro_batches=micro_batches,
        )
    )
    log = Log(resolved, place.world_size, total, state.step) if place.rank == 0 else None
    loader = Loader(
        segments,
        order,
        data_parallel_rank=place.data_rank,
        data_parallel_size=place.data_size,
        micro_batch_size=batch.micro_batch_size,
        num_micro_batches=micro_batches,
        samples_consumed=state.samples,
    )
    stop: str | None = None
    try:
        while state.step < total and stop is None:
            hang.beat(f"step {state.step + 1}")
            trainer.stopwatch.start()
            share = next(loader)
            rate = learning_rate(state.step, resolved.optimizer, total)
            result = trainer.step(share, rate, requests.number(), losses.accept)
            if losses.action != "go on":
                segment, rows = order.batch(state.samples)
                if log:
                    log.remarkable(state.step + 1, losses.reason, result.applied, segment, rows.tolist())
                if losses.action == "stop":
                    hang.beat("saving the last good step")
                    keeper.finish(state)
                    raise _stopped(state.step + 1, losses.reason, segment, rows.tolist())
            state = state.after_batch(
                batch.global_batch_size, batch.global_batch_size * resolved.model.sequence_length, losses.window
            )
            done = state.step
            if log:
                log.step(done, result.loss, result.grad_norm, rate)
                status.progress(
                    step=done,
                    samples=state.samples,
                    tokens=state.tokens,
                    loss=result.loss,
                    tokens_per_second=log.tokens_per_second,
                    eta_seconds=log.eta_seconds,
                )
            if (verdict := slow.check(trainer.stopwatch.seconds())) is not None:
                note(f"step {done}: rank {place.rank} on {platform.node()} {verdict}")
            decision = requests.decide(result.request)
            stop = decision.stop
            # Scored before it is saved: what is saved is not done again, and a last step is always scored.
            scored = held_out and (done == total or (done % resolved.data.held_out_interval == 0 and stop is None))
            if scored:
                loss = trainer.held_out_loss(_beating(held_out, hang, done), resolved.data.held_out_rows)
                if log:
                    log.held_out(done, loss)
            hang.beat(f"save after step {done}")
            if keeper.after_step(state, due=decision.save):
                requests.saved()
        hang.beat("last save")
        keeper.finish(state)
        if state.step < total:
            status.end("stopped", f"{stop}; a checkpoint of step {state.step} is durable", step=state.step)
            if log:
                note(f"stopped after step {state.step}: {stop}; start the same command again to go on")
        else:
            status.end("completed", f"all {total} steps are done", step=total)
    finally:
        hang.close()
        loader.close()
        if log:
            log.close()


def _beating(shares: Iterable[BatchShare], hang: HangWatch, step: int) -> Iterator[BatchShare]:
    for share in shares:
        hang.beat(f"held-out loss after step {step}")
        yield share


def _stopped(step: int, reason: str, segment: int, rows: list[int]) -> TrainingError:
    return TrainingError(
        f"step {step}: {reason}; the update was not made, the step before is saved. Its batch is segment {segment}, "
        f"rows {rows}. Look at those rows (python data_tools/build_amber.py verify), or resume with "
        "watchdog.non_finite=skip watchdog.spike=skip"
    )
