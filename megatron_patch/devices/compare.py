"""The forms of one checkpoint, measured one after the other and judged against it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_patch.data.segments import open_segments
from megatron_patch.devices.forms import DeviceForm
from megatron_patch.devices.machine import read_bandwidth
from megatron_patch.devices.measure import Answer, measure
from megatron_patch.devices.reference import Reference
from megatron_patch.devices.runtimes import RuntimeFormError
from megatron_patch.devices.table import Measured
from megatron_patch.recipe import Recipe

PROMPTS, PROMPT_TOKENS = 8, 16
TOLERANCE = 1e-4
"""How far a log-probability of an fp32 form may be from the checkpoint's: ten times what the order of sums makes."""

_SEED = 11111
_LONGEST = 512  # ids of a row that are scored, within the model's context: some runtimes give one at a time


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        threads: numbers of threads, one measurement each.
        new_tokens: greedy ids after each prompt.
        tokens: ids to score, at least.
        data: data set with held-out rows; None: the recipe's.
        random: seeded random ids instead.
        most_loss: nats a token that a form may lose.
    """

    threads: Sequence[int]
    new_tokens: int
    tokens: int
    data: Path | None
    random: bool
    most_loss: float


@dataclass(frozen=True)
class Texts:
    """Ids to ask: prompts to continue and rows to score, and what they are, in words."""

    prompts: list[list[int]]
    rows: list[list[int]]
    told: str


def measure_group(checkpoint: Path, forms: Sequence[DeviceForm], asked: Asked) -> tuple[list[Measured], str, list[str]]:
    """The table's rows, what the losses are of, and each form's faults: not measured, or worse than it may be.

    Raises:
        RuntimeFormError: there are no held-out rows, or the model has no room for the new tokens.
        CheckpointError, DataError: the checkpoint or the data set is damaged.
    """
    reference = Reference(checkpoint)
    model = reference.recipe.model
    if PROMPT_TOKENS + asked.new_tokens > model.sequence_length:
        raise RuntimeFormError(
            f"{asked.new_tokens} new tokens after a prompt of {PROMPT_TOKENS} are more than the model's "
            f"{model.sequence_length}; take fewer by --new-tokens"
        )
    texts = _texts(reference.recipe, asked)
    expected = [reference.log_probs(row) for row in texts.rows]
    rows, faults = [], []
    for threads in asked.threads:
        bandwidth = read_bandwidth(threads)
        for form in forms:
            print(f"{form.path}: {threads} thread(s)", file=sys.stderr)
            scored = texts.rows if threads == asked.threads[0] else texts.rows[:1]
            exact = form.is_fp32(model)
            try:
                answer = measure(form.path, threads, exact, asked.new_tokens, texts.prompts, scored)
            except RuntimeFormError as error:  # the next form may still be measured
                faults.append(f"not measured: {form.path} on {threads} thread(s): {error}")
                continue
            pairs = zip(texts.prompts, answer.continued, strict=True)
            alike = sum(reference.chosen_alike(prompt, ids, answer.eos) for prompt, ids in pairs)
            ours, theirs = (np.concatenate(parts) for parts in (expected[: len(scored)], answer.log_probs))
            row = Measured(
                recipe=reference.recipe.name,
                form=str(form.path),
                runtime=answer.runtime,
                threads=threads,
                file_bytes=form.file_bytes,
                bits=form.bits(model),
                resident_bytes=answer.resident,
                load_seconds=answer.load_seconds,
                first_seconds=answer.first_seconds,
                tokens_per_second=answer.tokens_per_second,
                cpu_seconds=answer.cpu_seconds,
                joules=answer.joules,
                bandwidth=bandwidth,
                roofline=answer.tokens_per_second * form.bytes_read(model) / bandwidth,
                same_tokens=alike / sum(map(len, answer.continued)),
                worst=float(np.abs(ours - theirs).max()),
                loss=float(-theirs.mean()),
                checkpoint_loss=float(-ours.mean()),
            )
            rows.append(row)
            faults += [f"worse than its checkpoint: {fault}" for fault in _faults(form, row, answer, asked, exact)]
    return rows, texts.told, faults


def _faults(form: DeviceForm, row: Measured, answer: Answer, asked: Asked, exact: bool) -> list[str]:
    named, found = f"{form.path} on {row.threads} thread(s)", []
    if any(len(ids) != asked.new_tokens for ids in answer.continued):
        found.append(f"{named}: fewer than {asked.new_tokens} tokens after a prompt")
    if exact:
        if row.worst > TOLERANCE:
            found.append(f"{named}: fp32, but a log-probability differs by {row.worst:.2g}")
        if row.same_tokens < 1:
            found.append(f"{named}: fp32, but only {row.same_tokens:.1%} of its greedy tokens are the checkpoint's")
    if not row.loss - row.checkpoint_loss <= asked.most_loss:  # not a number is no less
        found.append(
            f"{named}: loses {row.loss - row.checkpoint_loss:.4f} nats a token, more than {asked.most_loss:g} "
            "(--most-loss)"
        )
    return found


def _texts(recipe: Recipe, asked: Asked) -> Texts:
    length = min(recipe.model.sequence_length, _LONGEST, max(asked.tokens + 1, PROMPT_TOKENS))
    if asked.random:
        shape = (max(PROMPTS, -(-asked.tokens // (length - 1))), length)
        rows = np.random.default_rng(_SEED).integers(3, recipe.model.vocab_size, shape)
        source = "random ids"
    else:
        folder = asked.data or recipe.data.folder
        if folder is None:
            raise RuntimeFormError("the recipe names no data set; name one with --data, or take --random")
        segments = open_segments(folder, row_length=recipe.row_length, vocab_size=recipe.model.vocab_size)
        if segments.held_out_rows < PROMPTS:
            raise RuntimeFormError(
                f"{folder}: {segments.held_out_rows} held-out rows, {PROMPTS} are needed; name a data set with --data, "
                "or take --random"
            )
        rows = segments.read_held_out(_spread(segments.held_out_rows, asked.tokens, length))[:, :length]
        source = f"held-out rows of {folder}"
    number = -(-asked.tokens // (rows.shape[1] - 1))
    prompts = [[int(i) for i in row[:PROMPT_TOKENS]] for row in rows[:PROMPTS]]
    scored = [[int(i) for i in row] for row in rows[:number]]
    told = f"{sum(len(row) - 1 for row in scored):,} ids of {source} on {asked.threads[0]} thread(s)"
    if len(asked.threads) > 1:
        told += f", {len(scored[0]) - 1} of them on others"
    return Texts(prompts, scored, told)


def _spread(available: int, tokens: int, length: int) -> np.ndarray:
    """Row numbers for `tokens` labels, evenly over all sources' rows, at least as many as prompts."""
    wanted = max(PROMPTS, -(-tokens // (length - 1)))
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).astype(np.int64))
