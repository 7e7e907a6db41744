"""The training loop: `torchrun --nproc-per-node N -m megatron_patch train recipes/X.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_patch import launch, recipe, topology
from megatron_patch.data.deal import deal
from megatron_patch.data.loader import Loader, held_out_shares
from megatron_patch.data.order import SampleOrder
from megatron_patch.data.segments import DataError, Segments, open_segments
from megatron_patch.recipe import Recipe, RecipeError
from megatron_patch.train.metrics import Log
from megatron_patch.train.schedule import learning_rate
from megatron_patch.train.step import Trainer


class TrainingError(RuntimeError):
    """A run that had to stop: names the step, the rows of its batch and the remedy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. batch.micro_batch_size=4")


def main(args: argparse.Namespace) -> int:
    """Train to the recipe's last step. Exit code 2: refused before the first step; 1: stopped by an error."""
    launch.setup_environment()
    is_first = os.environ["RANK"] == "0"
    try:
        resolved = recipe.load(args.recipe, args.overrides)
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
        return 2
    place = topology.initialize(resolved.parallel)
    if is_first:
        print(f"{resolved.to_yaml()}# {place}, {total_steps:,} steps of {data_size} data-parallel ranks", flush=True)
        resolved.run_folder.mkdir(parents=True, exist_ok=True)
        (resolved.run_folder / "recipe.yaml").write_text(resolved.to_yaml())
    try:
        _train(resolved, place, segments, order, total_steps)
    except TrainingError as error:
        if is_first:
            print(f"stopped: {error}", file=sys.stderr)
        return 1
    topology.destroy()
    return 0


def _open_data(resolved: Recipe) -> Segments:
    if resolved.data.folder is None:
        raise RecipeError("data.folder: not set; name the folder that data_tools/build_amber.py wrote")
    segments = open_segments(resolved.data.folder, row_length=resolved.row_length, vocab_size=resolved.model.vocab_size)
    if resolved.data.held_out_interval and segments.held_out_rows < resolved.data.held_out_rows:
        raise DataError(
            f"{segments.held_out_rows} held-out rows, the recipe scores {resolved.data.held_out_rows}",
            file=resolved.data.folder,
            remedy="lower data.held_out_rows, or set data.held_out_interval=0",
        )
    return segments


def _total_steps(resolved: Recipe, order: SampleOrder) -> int:
    steps = resolved.run.steps or order.total_steps
    if order.total_steps == 0 or steps > order.total_steps:
        raise DataError(
            f"holds {order.total_steps:,} steps of {resolved.batch.global_batch_size} rows "
            f"({order.steps_per_segment:,} a segment), the recipe asks for {steps:,}",
            file=resolved.data.folder or "",
            remedy="lower run.steps or batch.global_batch_size, or build more segments",
        )
    return steps


def _train(resolved: Recipe, place: topology.Topology, segments: Segments, order: SampleOrder, total: int) -> None:
    batch = resolved.batch
    multiple = resolved.parallel.pipeline if resolved.parallel.virtual_pipeline > 1 else 1
    micro_batches = deal(batch.global_batch_size, place.data_size, batch.micro_batch_size, multiple_of=multiple)
    trainer = Trainer(resolved, place, micro_batches)
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
    log = Log(resolved, place.world_size, total) if place.rank == 0 else None
    done = 0
    loader = Loader(
        segments,
        order,
        data_parallel_rank=place.data_rank,
        data_parallel_size=place.data_size,
        micro_batch_size=batch.micro_batch_size,
        num_micro_batches=micro_batches,
        samples_consumed=done * batch.global_batch_size,
    )
    try:
        while done < total:
            share = next(loader)
            rate = learning_rate(done, resolved.optimizer, total)
            result = trainer.step(share, rate)
            done += 1
            if not result.applied:
                segment, rows = order.batch((done - 1) * batch.global_batch_size)
                raise TrainingError(
                    f"step {done}: loss {result.loss}, gradient norm {result.grad_norm}; the update was not applied. "
                    f"Its batch is segment {segment}, rows {rows.tolist()}. Look at those rows "
                    "(python data_tools/build_amber.py verify), or resume with watchdog.non_finite=skip"
                )
            if log:
                log.step(done, result.loss, result.grad_norm, rate)
            if held_out and (done % resolved.data.held_out_interval == 0 or done == total):
                loss = trainer.held_out_loss(held_out, resolved.data.held_out_rows)
                if log:
                    log.held_out(done, loss)
    finally:
        loader.close()
        if log:
            log.close()
