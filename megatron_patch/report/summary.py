"""`python -m megatron_patch summary RUN`: what a finished run reached: a table, a curve and a sample of its text."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import matplotlib
import numpy as np
from sentencepiece import SentencePieceProcessor

from data_tools.files.plain_file import read_plain
from megatron_patch import launch
from megatron_patch.data.segments import DataError, Segments, open_segments
from megatron_patch.generate import load_model, sample
from megatron_patch.model import counts
from megatron_patch.recipe import Recipe, load
from megatron_patch.run.log import is_step, records
from megatron_patch.train.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from megatron_patch.train.checkpoint.run_folder import LATEST_NAME

matplotlib.use("Agg")  # a file is drawn, no window is opened
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter


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
        checkpoint = _newest(args.run)
        tokenizer = _tokenizer(segments)
        text = sample(
            load_model(checkpoint.recipe, checkpoint.tensor, timedelta(minutes=10)),
            tokenizer,
            args.prompt,
            num_tokens=args.tokens,
            sequence_length=recipe.model.sequence_length,
        )
    except (ValueError, OSError, CheckpointError, DataError) as error:
        print(f"summary: {error}", file=sys.stderr)
        return 2
    print(f"\nsample         {args.prompt!r} continued by step {checkpoint.step} at temperature 0.8:\n")
    print("\n".join("    " + line for line in text.splitlines()))
    curve = args.run / "loss.png"
    _draw(history, curve, unigram_loss(segments, recipe.data.held_out_rows) if history.held_out else None)
    print(f"\nloss curve     {curve}")
    return 0


def _tokenizer(segments: Segments) -> SentencePieceProcessor:
    path = segments.tokenizer_path
    if path is None or path.suffix != ".model":
        raise ValueError(f"{path or segments.folder}: no tokenizer.model with the data, so no text can be sampled")
    return SentencePieceProcessor(model_file=str(path))


def _newest(run: Path) -> Checkpoint:
    latest = run / "checkpoints" / LATEST_NAME
    if not latest.exists():
        raise ValueError(f"{latest}: no checkpoint yet, so there is nothing to sample from; train further")
    return open_checkpoint(latest.parent / read_plain(latest).decode(errors="replace").strip())


@dataclass(frozen=True)
class History:
    """RUN/log.jsonl: the last record of each step (a resumed run repeats the steps after its checkpoint)."""

    steps: dict[int, dict]
    held_out: dict[int, float | None]

    @classmethod
    def read(cls, path: Path) -> History:
        steps, held_out = {}, {}
        for record in records(path):
            if "held_out_loss" in record:
                held_out[record["step"]] = record["held_out_loss"]
            elif is_step(record):
                steps[record["step"]] = record
        if not steps:
            raise ValueError(f"{path}: holds no step yet; train first")
        return cls(steps, held_out)


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
    first, last = (history.steps[pick(history.steps)] for pick in (min, max))
    seconds = sum(r["seconds"] for r in history.steps.values())
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
    if history.held_out:
        held_out = history.held_out[max(history.held_out)]
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
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    tokens_a_step = next(iter(history.steps.values()))["tokens"] / next(iter(history.steps))
    axes.plot(
        [r["tokens"] for r in history.steps.values()],
        [r["loss"] for r in history.steps.values()],
        color="tab:blue",
        alpha=0.5,
        label="training loss",
    )
    if history.held_out:
        axes.plot(
            [step * tokens_a_step for step in history.held_out],
            [math.nan if loss is None else loss for loss in history.held_out.values()],
            color="tab:orange",
            marker="o",
            label="held-out loss",
        )
    if unigram is not None:
        axes.axhline(unigram, color="gray", linestyle="--", label="unigram model, held-out")
    axes.set(xlabel="tokens", ylabel="nats/token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
