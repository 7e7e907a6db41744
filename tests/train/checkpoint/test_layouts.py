"""A checkpoint of one layout goes on in any other: same rows, same losses; in its own, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.train.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.job import Job, write_data_set

WRITTEN, STEPS = 8, 13

# name: (ranks, overrides). Eight rows a step, so three data-parallel ranks get unequal shares.
WRITERS = {
    "TP2xPP2xDP1": (4, ["parallel.tensor=2", "parallel.pipeline=2", "batch.micro_batch_size=2"]),
    "TP1xPP1xDP4": (4, ["batch.micro_batch_size=2"]),
    "PP2xVPP2xDP2": (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.micro_batch_size=1"]),
}
READERS = {
    **WRITERS,
    "TP1xPP1xDP1": (1, ["batch.micro_batch_size=8"]),
    "DP3": (3, ["batch.micro_batch_size=1"]),
    "TP2+SP, ZeRO-2 on DP2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.zero_stage=2"]),
}
# Of six layers on three stages, the first of two FFNs in blocks ends inside the second stage.
OF_SIX = {
    "PP3": (3, ["parallel.pipeline=3", "batch.micro_batch_size=1"]),
    "PP3xVPP2": (3, ["parallel.pipeline=3", "parallel.virtual_pipeline=2", "batch.micro_batch_size=1"]),
}
TWO_IN_BLOCKS = ["model.num_layers=6", "model.num_ffns=2"]
THREE_BY_TURNS = ["model.num_layers=6", "model.num_ffns=3", "model.ffn_pattern=cycle"]


def settings(data_folder: Path, run: Path, *overrides: str) -> list[str]:
    return [
        f"data.folder={data_folder}",
        f"run.folder={run}",
        "optimizer.decay_steps=20",
        "checkpoint.keep=100",
        "data.held_out_interval=0",
        *overrides,
    ]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def written(data_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Per writer and model, made on demand: the undisturbed run of all steps, with a checkpoint after the eighth."""
    made: dict[tuple[str, ...], Path] = {}

    def write(writer: str, *model: str) -> Path:
        if (writer, *model) not in made:
            ranks, overrides = {**WRITERS, **OF_SIX}[writer]
            made[writer, *model] = run = tmp_path_factory.mktemp("written") / "run"
            steps = [f"checkpoint.interval_steps={WRITTEN}", f"run.steps={STEPS}"]
            Job(ranks, settings(data_folder, run, *overrides, *model, *steps), run.with_suffix(".log")).run()
        return made[writer, *model]

    return write


@pytest.mark.parametrize(
    ("writer", "reader", "model"),
    [
        *((writer, reader, []) for writer in WRITERS for reader in READERS),
        *(("PP3", reader, TWO_IN_BLOCKS) for reader in ("PP3", "TP1xPP1xDP1", "TP2+SP, ZeRO-2 on DP2")),
        ("TP2xPP2xDP1", "PP3xVPP2", THREE_BY_TURNS),
    ],
)
def test_read_in(written, data_folder: Path, tmp_path: Path, writer: str, reader: str, model: list[str]) -> None:
    undisturbed, run = written(writer, *model), tmp_path / "run"
    folder = Path("checkpoints") / f"step_{WRITTEN:08d}"
    shutil.copytree(undisturbed / folder, run / folder)
    ranks, overrides = {**READERS, **OF_SIX}[reader]
    said = Job(ranks, settings(data_folder, run, *overrides, *model, f"run.steps={STEPS}"), tmp_path / "log").run()
    assert f"resuming from {run / folder} at step {WRITTEN}, {8 * WRITTEN} samples" in said
    expected, resumed = history(undisturbed), history(run)
    assert list(resumed) == list(range(WRITTEN + 1, STEPS + 1))
    if reader == writer:
        assert resumed == {step: expected[step] for step in resumed}
        assert_bit_equal(newest(run), newest(undisturbed))
        return
    for step, (samples, loss, _) in resumed.items():
        assert samples == expected[step][0]
        assert abs(loss - expected[step][1]) <= 1e-5 * expected[step][1], f"step {step}"
    for name in newest(run).names():
        ours, theirs = newest(run).tensor(name, "exp_avg"), newest(undisturbed).tensor(name, "exp_avg")
        assert torch.linalg.norm(ours - theirs) <= 1e-4 * torch.linalg.norm(theirs), name


@pytest.mark.parametrize("writer", WRITERS)
def test_bf16_resumed_in_its_own_layout_is_bit_identical(data_folder: Path, tmp_path: Path, writer: str) -> None:
    ranks, overrides = WRITERS[writer]
    once, twice = tmp_path / "once", tmp_path / "twice"
    Job(
        ranks, settings(data_folder, once, *overrides, "precision=bf16", f"run.steps={STEPS}"), tmp_path / "once.log"
    ).run()
    for steps in (WRITTEN, STEPS):
        Job(
            ranks,
            settings(data_folder, twice, *overrides, "precision=bf16", f"run.steps={steps}"),
            tmp_path / "twice.log",
        ).run()
    assert history(twice) == history(once)
    with newest(twice) as checkpoint:
        assert_bit_equal(checkpoint, newest(once))
        for name in checkpoint.names():
            weight = checkpoint.tensor(name)
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, checkpoint.tensor(name, "master").bfloat16()), name
