"""Ranks on one GPU, as far as a CPU can prove it: collectives by way of the host, and the comparison with one rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu_session, one_gpu, staged
from tests.pretend_gpu import become_gpu
from tests.ranks import run_ranks
from tests.toy import train_toy


def by_host(layout: str, folder: Path) -> None:
    rank = dist.get_rank()
    dist.barrier()  # a rank that leaves while another still connects breaks its connection
    dist.destroy_process_group()
    one_gpu.train(layout, rank, folder)


@pytest.mark.parametrize("layout", one_gpu.ALL)
def test_a_layout_gives_the_bits_that_gloo_gives(layout: str, tmp_path: Path) -> None:
    ranks, overrides = one_gpu.LAYOUTS[layout]
    run_ranks(ranks, by_host, layout, tmp_path)
    plain = run_ranks(ranks, train_toy, [*one_gpu.MODEL, *overrides], one_gpu.STEPS)
    for rank, expected in enumerate(plain):
        got = torch.load(tmp_path / f"{layout}.{rank}.pt")
        assert (got["losses"], got["norms"]) == (expected["losses"], expected["norms"])
        assert all(torch.equal(part, expected["parts"][name]) for name, part in got["parts"].items())


class HostOnly:
    """In gloo's place: sees where the tensors are that it is given."""

    def __init__(self) -> None:
        self.devices: list[str] = []

    def __getattr__(self, name: str):
        def collective(*arguments: object) -> SimpleNamespace:
            self.devices += [t.device.type for t in torch.utils._pytree.tree_leaves(arguments) if torch.is_tensor(t)]
            return SimpleNamespace(wait=lambda: None, is_completed=lambda: True)

        return collective


def on_a_pretended_gpu() -> list[str]:
    with become_gpu():
        torch.cuda.current_stream = lambda *_: SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]
        seen = HostOnly()
        group = staged.StagedGroup(seen, 0, 2)
        one, two = torch.zeros(2, device="cuda"), torch.zeros(4, device="cuda", requires_grad=True)
        assert one.device.type == "cuda"
        group.allreduce([one], None).wait()
        group.allgather([[one, one]], [one], None).wait()
        group._allgather_base(two, one, None).wait()
        group._reduce_scatter_base(one, two, None).wait()
        group.send([one], 1, 0).wait()
        group.recv([two], 1, 0).wait()
        return seen.devices


def test_gloo_is_given_no_tensor_of_the_gpu() -> None:
    assert run_ranks(1, on_a_pretended_gpu) == [["cpu"] * 10]


def refused() -> list[str]:
    dist.destroy_process_group()
    staged.register()
    dist.init_process_group(staged.NAME, store=dist.HashStore(), rank=0, world_size=1)
    tensor, answers = torch.ones(1), []
    for collective in (lambda: dist.reduce(tensor, 0), lambda: dist.all_to_all([tensor], [tensor])):
        with pytest.raises(NotImplementedError) as error:
            collective()
        answers.append(str(error.value))
    return answers


def test_a_collective_that_is_not_served_is_refused_by_name() -> None:
    ((reduce, exchange),) = run_ranks(1, refused)
    assert reduce.startswith("reduce: several ranks on one GPU")
    assert exchange.startswith("alltoall: several ranks on one GPU")


def test_the_sessions_part_compares_a_layout_and_tells_one_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_gpu, "ALL", ["TP2"])
    part = gpu_session.Session(tmp_path, tmp_path, time.monotonic() + 540).layouts(120)
    assert part.pop("within 1e-05 of one rank") is True, part
    assert set(part) == {"TP2"} and set(part["TP2"]) == {"losses", "norms", "weights"}
    assert json.loads((tmp_path / "layouts/layouts.json").read_text()) == part

    for rank in range(2):  # a norm that does not sum over both ranks' parts, a rank that disagrees
        file = tmp_path / f"layouts/TP2.{rank}.pt"
        answer = torch.load(file)
        answer["norms"][-1] *= 1.001
        torch.save(answer, file)
        if rank == 0:
            with pytest.raises(ValueError, match="ranks differ in losses or norms"):
                one_gpu.difference("TP2", tmp_path / "layouts")
    assert not one_gpu.verdict({"TP2": one_gpu.difference("TP2", tmp_path / "layouts")})


@pytest.mark.parametrize("found", ["did not end", {"losses": float("nan")}, {"losses": 0.0, "norms": 2e-5}])
def test_a_layout_that_is_off_or_did_not_end_is_no_proof(found: object) -> None:
    assert one_gpu.verdict({"PP2": {"losses": 1e-6}})
    assert not one_gpu.verdict({"PP2": {"losses": 1e-6}, "TP2": found})


def test_a_part_that_breaks_leaves_the_next_its_turn(tmp_path: Path) -> None:
    session = gpu_session.Session(tmp_path, tmp_path, time.monotonic() + 540)

    def breaks(_: float) -> None:
        raise KeyError("loss")

    session.run({"first": (breaks, 60), "second": (lambda _: "whole", 60), "third": (lambda _: "", 1)})
    results = json.loads((tmp_path / "session.json").read_text())
    assert results["first"] == "KeyError: 'loss'" and results["second"] == "whole"
    assert results["third"] == "left out: the time is up"


def test_sigterm_keeps_what_is_known(tmp_path: Path) -> None:
    """The session's command with no data: its resume fails at once, its tests run when SIGTERM comes."""
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--data", str(tmp_path / "none"), "--out", str(tmp_path)]
    session = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert session.stdout is not None
    for line in session.stdout:
        if line.startswith("tests: at most"):
            session.send_signal(signal.SIGTERM)
            break
    session.stdout.close()
    assert session.wait(60) == 128 + signal.SIGTERM
    results = json.loads((tmp_path / "session.json").read_text())
    assert results["resume"].startswith("ValueError: training ended with") and results["tests"] == "cut short"
