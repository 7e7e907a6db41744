"""The preflight's verdict on made-up answers, and its measurements on real gloo ranks, one of them planted sick."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest

from megatron_patch.__main__ import main
from megatron_patch.preflight import command as preflight
from megatron_patch.preflight import judge

LIMITS = judge.Limits(slow=0.8, slow_network=0.6, slow_disk=0.2, patience=30)


def answers(count: int, **changed: dict[str, object]) -> dict[int, dict[str, object]]:
    fit = {"device": "A100", "gemm": 250e12, "copy": 1.5e12, "disk": 2e9}
    return {rank: {**fit, **changed.get(f"rank{rank}", {})} for rank in range(count)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gemm": 190e12}, "rank 3: gemm at 76% of the median pace"),
        ({"copy": 1.0e12, "disk": 1e8}, "rank 3: copy at 67% of the median pace, disk at 5% of the median pace"),
        ({"device": "CPU"}, "rank 3: device CPU where most have A100"),
        ({"error": "GPU 5: 2 uncorrected ECC errors since boot"}, "rank 3: GPU 5: 2 uncorrected ECC errors since boot"),
    ],
)
def test_a_sick_node_is_named_with_its_reason(change: dict[str, object], reason: str) -> None:
    hosts = ["a", "a", "b", "b", "c", "c"]
    assert judge.unfit_nodes(hosts, answers(6, rank3=change), LIMITS) == {"b": reason}


def test_a_silent_rank_condemns_its_node() -> None:
    heard = answers(4)
    del heard[2]
    assert judge.unfit_nodes(["a", "a", "b", "b"], heard, LIMITS) == {"b": "rank 2 never answered"}


@pytest.mark.parametrize("count", range(21))
def test_pairings_are_disjoint_and_never_repeat(count: int) -> None:
    rounds = judge.pairings([f"n{i}" for i in range(count)])
    assert len(rounds) == min(judge.ROUNDS, max(count - 1 + count % 2, 0)) if count > 1 else not any(rounds)
    for pairs in rounds:
        assert len(pairs) == count // 2
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(set(met)) == len(met)


@pytest.mark.parametrize("sick", [{"n4"}, {"n0", "n7"}, set()])
@pytest.mark.parametrize("pace", [None, 1e9])
def test_of_a_failing_or_slow_pair_the_right_node_is_blamed(sick: set[str], pace: float | None) -> None:
    hosts = [f"n{i}" for i in range(10)]
    paces = {pair: pace if sick & set(pair) else 20e9 for pairs in judge.pairings(hosts) for pair in pairs}
    assert set(judge.unfit_pairs(paces, 0.6)) == sick


def test_two_nodes_that_fail_together_are_both_named() -> None:
    assert judge.unfit_pairs({("a", "b"): None}, 0.6) == {
        "a": "all-reduce with b fails",
        "b": "all-reduce with a fails",
    }


def test_a_broken_link_between_two_fit_nodes_names_both() -> None:
    paces: dict[tuple[str, str], float | None] = dict.fromkeys(combinations("abcd", 2), 20e9)
    paces["a", "b"] = None
    assert set(judge.unfit_pairs(paces, 0.6)) == {"a", "b"}


def die() -> dict[str, float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_measurement_that_hangs_raises_or_dies_costs_no_more_than_itself() -> None:
    assert preflight.in_child(lambda: {"gemm": 1.0}, patience=10) == {"gemm": 1.0}
    assert preflight.in_child(lambda: {"x": 1 / 0}, patience=10) == {"error": "ZeroDivisionError: division by zero"}
    assert preflight.in_child(die, patience=10) == {"error": "the measurement died with exit code -9"}
    start = time.monotonic()
    assert preflight.in_child(lambda: time.sleep(60) or {}, patience=0.5) == {"error": "no answer after 0.5 s"}
    assert time.monotonic() - start < 10


def test_measurements_come_out_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    result = preflight.in_child(lambda: preflight.measure_node(tmp_path), patience=60)
    assert result["device"] == "CPU"
    assert all(result[what] > 0 for what in judge.RATES)
    assert not list(tmp_path.iterdir())


def test_answers_of_an_earlier_check_are_never_taken_for_new_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "node.0.json").write_text('{"device": "CPU"}')
    (tmp_path / "verdict.json").write_text('{"good": ["a"], "bad": {}}')
    assert main(["check", "recipes/demo.yaml", "parallel.tensor=1", "--folder", str(tmp_path)]) == 2
    assert f"{tmp_path} holds answers of an earlier check" in capsys.readouterr().err


def test_the_ranks_of_one_start_share_a_name_and_no_other_start_has_it() -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2"}
    assert preflight.name_of_start(step) == "7.2"
    assert preflight.name_of_start({**step, "TORCHELASTIC_RUN_ID": "x"}) == "x"
    assert str(os.getpid()) in preflight.name_of_start({})


def test_four_ranks_on_four_hosts_one_of_which_cannot_write_its_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real gloo ranks under real processes; the host names stand for nodes that all live here."""
    folder = tmp_path / "check"
    folder.mkdir()
    hosts = ["localhost", "127.0.0.1", "127.0.0.2", "127.0.0.3"]
    (folder / "hosts").write_text("\n".join(hosts))
    run = tmp_path / "run"
    sick = tmp_path / "sick"
    sick.write_text("a file where a folder should be")
    demo = Path(__file__).parents[2] / "recipes/demo.yaml"
    command = [sys.executable, "-m", "megatron_patch", "check", demo, "parallel.tensor=1"]
    options = ["--folder", folder, "--slow", "0.001", "--slow-network", "0.001", "--slow-disk", "0.001"]
    ranks = [
        subprocess.Popen(
            [*command, f"run.folder={sick if rank == 2 else run}", *options],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    # Rank 0 speaks for all: four errors of one launcher would say nothing more.
    assert [rank.returncode for rank in ranks] == [1, 0, 0, 0], printed[0]
    assert (folder / "good").read_text().split() == [hosts[0], hosts[1], hosts[3]]
    bad = (folder / "bad").read_text()
    assert bad.startswith("127.0.0.2: rank 2: ") and "sick" in bad
    assert printed[0] == bad + f"fit nodes: 3; details in {folder}\n"
    # What the three fit ones reach is what `plan` then reckons with.
    measured = json.loads((folder / "measured.json").read_text())
    assert (measured["device"], measured["ranks"], measured["nodes"]) == ("CPU", 3, 3)
    nodes = [json.loads((folder / f"node.{rank}.json").read_text()) for rank in (0, 1, 3)]
    for what in judge.RATES:
        assert measured[what] == min(node[what] for node in nodes)
    together = [json.loads((folder / f"all.{rank}.json").read_text()) for rank in (0, 1, 3)]
    for size, seconds in measured["all_reduce"].items():
        assert seconds == max(answer["seconds"][size] for answer in together)
    on = ["--nodes", "3", "--gpus-per-node", "1", "--measured", str(folder)]
    assert main(["plan", str(demo), "parallel.tensor=1", "parallel.pipeline=1", *on]) == 0
    text = capsys.readouterr().out
    assert f"measured on 3 ranks of CPU on 3 nodes, the network between them ({folder}/measured.json)" in text
    size, seconds = max(((int(size), seconds) for size, seconds in measured["all_reduce"].items()))
    assert f"all ports of a node {2 * 2 / 3 * size / seconds / 1e9:.3g} GB/s" in text
    assert f"matrix products at {measured['gemm'] / 1e12:.4g} TFLOP/s" in text
    rates = f"{measured['disk'] / 1e9:.3g} GB/s written, {measured['disk_read'] / 1e9:.3g} read by a node while all do"
    assert f"disk                {rates}: a save is durable after " in text
