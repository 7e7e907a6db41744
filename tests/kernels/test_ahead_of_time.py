"""Every Triton kernel compiles for the GPUs that are not here, keeps its numbers in registers and fits the card."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.ahead_of_time import ARCHITECTURES

# Shared memory that a program may use, and registers of a multiprocessor (CUDA programming guide, compute
# capabilities 8.0 and 9.0).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
REGISTERS = 65536
KERNELS = {
    *("triton_loss.row_statistics", "triton_loss.to_logits_gradient"),
    *("triton_norm.forward", "triton_norm.backward", "triton_swiglu.forward", "triton_swiglu.backward"),
    "triton_rotary.turn",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))  # nothing compiled before counts
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead_of_time", "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_every_kernel_was_compiled_for_every_gpu(compiled):
    for architecture in ARCHITECTURES:
        mine = [c for c in compiled if c["architecture"] == architecture]
        assert {c["kernel"] for c in mine} == KERNELS
        assert {c["case"] for c in mine} >= {"mobillama_05b, TP1", "mobillama_08b, TP2", "check at start"}


def test_nothing_spills_and_all_fits(compiled):
    for c in compiled:
        assert c["spilled"] == 0, c
        assert c["shared"] <= SHARED_LIMIT[c["architecture"]], c
        # Half of a multiprocessor's 2,048 threads run at once, in two programs at least: one computes while another
        # waits for memory. Registers are handed out to a thread by eights.
        threads = 32 * c["warps"]
        programs = REGISTERS // (-(-c["registers"] // 8) * 8 * threads)
        assert programs >= 2 and (programs * threads >= 1024 or c["case"] == "check at start"), c
