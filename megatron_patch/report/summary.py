"""`python -m megatron_patch summary RUN`: what a finished run reached: a table, a curve and a sample of its text."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from sentencepiece import SentencePieceProcessor

from data_tools.files.durable import write_beside
from data_tools.files.plain_file import read_plain
from megatron_patch import launch
from megatron_patch.data.segments import DataError, Segments, open_segments
from megatron_patch.generate import load_model, sample
from megatron_patch.model import counts
from megatron_patch.recipe import Recipe, load
from megatron_patch.report.answers import held_out_answers
from megatron_patch.report.seen import held_out_seen
from megatron_patch.report.series import Thinned
from megatron_patch.run.log import accepted_backwards, is_step
from megatron_patch.train.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from megatron_patch.train.checkpoint.run_folder import LATEST_NAME


def main(args: argparse.Namespace) -> int:
    try:
        if not args.prompt:
            raise ValueError("--prompt is empty; give the sample a text to continue")
        recipe = load(args.run / "recipe.yaml")
        history = History.read(args.run / "log.jsonl")
        if recipe.data.folder is None:
            raise ValueError(f"{args.run / 'recipe.yaml'}: data.folder is not set")
        segments = open_segments(recipe.data.folder, row_length=recipe.row_length, vocab_size=recipe.model.vocab_size)
        print(_table(recipe, history, segments))
        launch.setup_environment()
        checkpoint = newest_checkpoint(args.run)
        model = load_model(checkpoint.recipe, checkpoint.tensor, timedelta(minutes=10))
        if segments.manifest.images is not None and checkpoint.recipe.model.vision is not None:
            print(held_out_seen(model, segments, checkpoint.recipe.model.vision, args.tokens, args.run))
        elif segments.manifest.chat is not None:
            print(held_out_answers(model, segments, args.tokens))
        else:
            text = sample(
                model,
                _tokenizer(segments),
                args.prompt,
                num_tokens=args.tokens,
                sequence_length=recipe.model.sequence_length,
            )
            print(f"\nsample         {args.prompt!r} continued by step {checkpoint.step} at temperature 0.8:\n")
            print("\n".join("    " + line for line in text.splitlines()))
    except (ValueError, OSError, CheckpointError, DataError) as error:
        print(f"summary: {error}", file=sys.stderr)
        return 2
    curve = args.run / "loss.png"
    compared = history.has_held_out and not segments.is_marked
    _draw(history, curve, unigram_loss(segments, recipe.data.held_out_rows) if compared else None)
    print(f"\nloss curve     {curve}")
    return 0


def _tokenizer(segments: Segments) -> SentencePieceProcessor:
    path = segments.tokenizer_path
    if path is None or path.suffix != ".model":
        raise ValueError(f"{path or segments.folder}: no tokenizer.model with the data, so no text can be sampled")
    return SentencePieceProcessor(model_file=str(path))


def newest_checkpoint(run: Path) -> Checkpoint:
    """A run's newest checkpoint. Raises ValueError where it has none yet."""
    latest = run / "checkpoints" / LATEST_NAME
    if not latest.exists():
        raise ValueError(f"{latest}: no checkpoint yet, so there is nothing to sample from; train further")
    return open_checkpoint(latest.parent / read_plain(latest).decode(errors="replace").strip())


@dataclass(frozen=True)
class History:
    """RUN/log.jsonl without the steps that a resume made again: the first and the newest step, and what is drawn.

    Attributes:
        seconds: spent on its steps.
        loss, held_out: against tokens and against steps, the newest first.
        has_held_out: whether any was logged.
        first_held_out, last_held_out: the oldest and the newest; None where it was not finite.
    """

    first: dict[str, Any]
    last: dict[str, Any]
    seconds: float
    loss: Thinned
    held_out: Thinned
    has_held_out: bool
    first_held_out: float | None
    last_held_out: float | None

    @classmethod
    def read(cls, path: Path) -> History:
        """Raises ValueError where no step has been logged, OSError where there is no log."""
        first, last, first_held_out, last_held_out = None, None, None, None
        seconds, has_held_out = 0.0, False
        loss, held_out = Thinned(), Thinned()
        for record in accepted_backwards(path):
            if "held_out_loss" in record:
                value = first_held_out = record["held_out_loss"]
                last_held_out = last_held_out if has_held_out else value
                has_held_out = True
                if value is not None:
                    held_out.add(0.0, record["step"], value)
            elif is_step(record):
                first, last = record, last or record
                seconds += record["seconds"]
                if record["loss"] is not None:
                    loss.add(record["time"], record["tokens"], record["loss"])
        if first is None or last is None:
            raise ValueError(f"{path}: holds no step yet; train first")
        return cls(first, last, seconds, loss, held_out, has_held_out, first_held_out, last_held_out)


def unigram_loss(segments: Segments, held_out_rows: int) -> float:
    """Nats a token that a unigram model of the training rows, with one added to every count, has on held-out labels."""
    frequency = np.ones(segments.vocab_size)
    for segment in range(segments.num_segments):
        rows = segments.read(segment, np.arange(segments.rows_per_segment))
        frequency += np.bincount(rows.ravel(), minlength=segments.vocab_size)
    labels = segments.read_held_out(np.arange(held_out_rows))[:, 1:]
    return float(-np.log(frequency / frequency.sum())[labels].mean())


def _table(recipe: Recipe, history: History, segments: Segments) -> str:
    model, parallel = recipe.model, recipe.parallel
    first, last, seconds = history.first, history.last, history.seconds
    parameters = counts.parameters(model)
    ffn = f"1 FFN shared by {model.num_layers} layers" if model.shared_ffn else f"{model.num_layers} FFNs"
    rows = [
        ("model", f"{recipe.name}: {parameters.unique:,} parameters, {ffn} ({parameters.applied:,} applied)"),
        ("layout", f"TP{parallel.tensor} x PP{parallel.pipeline}, ZeRO-{parallel.zero_stage}, {recipe.precision}"),
        (
            "trained",
            f"{last['step']:,} steps, {last['tokens']:,} tokens in {seconds:,.0f} s: "
            f"{last['tokens'] / seconds:,.0f} tokens/s",
        ),
        ("loss", f"{_loss(first['loss'])} -> {_loss(last['loss'])} nats/token"),
    ]
    if history.has_held_out and segments.is_marked:
        before, after = history.first_held_out, history.last_held_out
        losses = f"held-out loss {_loss(before)} -> {_loss(after)} nats/token over {recipe.data.held_out_rows} rows"
        if before is not None and after is not None:
            losses += f": {'better' if after < before else 'WORSE'} by {abs(before - after):.4f}"
        rows.append(("on answers", losses))
    elif history.has_held_out:
        held_out = history.last_held_out
        unigram = unigram_loss(segments, recipe.data.held_out_rows)
        rows.append(("held-out loss", f"{_loss(held_out)} nats/token over {recipe.data.held_out_rows} rows"))
        comparison = f"{unigram:.4f} nats/token"
        if held_out is not None:
            verdict = "better" if held_out < unigram else "WORSE"
            comparison += (
                f": the model is {verdict} by {abs(unigram - held_out):.4f} "
                f"(perplexity {math.exp(held_out):.0f} against {math.exp(unigram):.0f})"
            )
        rows.append(("unigram model", comparison))
    return "\n".join(f"{name:<15}{value}" for name, value in rows)


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _draw(history: History, path: Path, unigram: float | None) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    tokens_a_step = history.last["tokens"] / history.last["step"]
    points = history.loss.points()
    axes.plot(
        [tokens for _, tokens, _ in points],
        [value for _, _, value in points],
        color="tab:blue",
        alpha=0.5,
        label="training loss",
    )
    if held_out := history.held_out.points():
        axes.plot(
            [step * tokens_a_step for _, step, _ in held_out],
            [value for _, _, value in held_out],
            color="tab:orange",
            marker="o",
            label="held-out loss",
        )
    if unigram is not None:
        axes.axhline(unigram, color="gray", linestyle="--", label="unigram model, held-out")
    axes.set(xlabel="tokens", ylabel="nats/token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend()
    with write_beside(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
