"""run.deterministic, the default: each operation of a step has a deterministic form, two runs give the same bits."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_patch.train.step import Trainer
from tests.train.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.job import Job, run_settings


def test_two_runs_give_the_same_bits(data_folder: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        real = Trainer.compute

        def compute(self: Trainer, *args):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
            return real(self, *args)

        Trainer.compute = compute

    for name in ("one", "other"):
        settings = run_settings(data_folder, tmp_path / name, "run.steps=6")
        Job(4, settings, tmp_path / "log", before).run()
    assert history(tmp_path / "one") == history(tmp_path / "other")
    assert_bit_equal(newest(tmp_path / "one"), newest(tmp_path / "other"))
