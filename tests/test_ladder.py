"""The ladder (benchmarks/ladder.py): arms of equal size, budgets that meet, a queue that goes on."""

import csv
import json
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest

from benchmarks.ladder import SIZES, protocol_of
from benchmarks.ladder_queue import RESULT, Ladder, LadderError, Protocol, Stage, _train, every_result
from benchmarks.ladder_report import mean_interval, report
from data_tools.dataset.format import segment_name
from data_tools.dataset.segment_files import DatasetPlan, write_dataset_manifest
from data_tools.files.strict_yaml import read_yaml
from megatron_patch.recipe import RECIPES, load
from megatron_patch.train import loop  # noqa: F401 - imported here once, not in each process that trains
from tests.data.conftest import write_rows


def parameters_without_embeddings(model) -> int:
    """Counted here by hand: attention's four matrices, SwiGLU's three, two norms a layer and the last."""
    h, f = model.hidden_size, model.ffn_hidden_size
    ffns = model.num_ffns or model.num_layers
    return model.num_layers * (4 * h * h + 2 * h) + ffns * 3 * h * f + h


@pytest.mark.parametrize("size", read_yaml(SIZES))
def test_arms_have_as_many_parameters_as_shared(size):
    protocol = protocol_of(size)
    arms = sorted(path.stem for path in (RECIPES / "ladder").glob("*.yaml") if path.stem != "common")
    assert arms == ["narrow", "shallow", "shared", "two_ffns"]
    counted = {
        arm: parameters_without_embeddings(load(RECIPES / "ladder" / f"{arm}.yaml", protocol.settings).model)
        for arm in arms
    }
    for arm, number in counted.items():
        assert abs(number / counted["shared"] - 1) < 0.01, (arm, counted)


ROW_LENGTH, VOCAB, SEGMENT, HELD_OUT = 257, 2048, 64, 4
PROTOCOL = Protocol(
    settings=protocol_of("smoke").settings,
    tokens=(4096, 8192),
    cooldown=0.25,
    rates=(0.01,),
    sweep_seed=100,
    queue=(Stage(arms=("shared", "shallow"), seeds=(1,)),),
)
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder") / "data"
    folder.mkdir()
    random = np.random.RandomState(0)
    plan = DatasetPlan(1, ROW_LENGTH, VOCAB, None, has_held_out=True)
    for name, count in ((segment_name(0), SEGMENT), ("held_out", HELD_OUT)):
        ids = random.randint(0, VOCAB, (count, ROW_LENGTH)).astype("<u2")
        write_rows(folder / name, ids, np.zeros(count, np.uint8), plan)
    write_dataset_manifest(folder, plan)
    return folder


def work(out, data, protocol=PROTOCOL):
    os.setsid()  # a group of its own, to be killed whole
    Ladder(protocol, data, out, "a commit", FORK).work()


def test_budgets_meet_at_equal_tokens_and_at_equal_flops(tmp_path, data):
    for size in read_yaml(SIZES):
        ladder = Ladder(protocol_of(size), data, tmp_path / size, "a commit", FORK)
        for budget in ladder.protocol.tokens:
            flops = ladder.steps("shared", budget, "tokens") * ladder.flops_per_token("shared")
            for arm in ladder.arms:
                steps = ladder.steps(arm, budget, "FLOPs")
                assert abs(steps * ladder.flops_per_token(arm) - flops) <= ladder.flops_per_token(arm) / 2
                assert ladder.steps(arm, budget, "tokens") == ladder.steps("shared", budget, "tokens")
    other = protocol_of("smoke").model_copy(update={"cooldown": 0.5})
    with pytest.raises(LadderError, match=r"protocol\.json: was begun with another protocol"):
        Ladder(other, data, tmp_path / "smoke", "a commit", FORK)


def test_the_best_rate_stands_between_two_others(tmp_path, data):
    protocol = PROTOCOL.model_copy(update={"rates": (0.01, 0.02)})
    ladder = Ladder(protocol, data, tmp_path, "a commit", FORK)
    tried = []
    while (found := ladder.sweep("shared"))[0] is None:
        for case in found[1]:
            tried.append(case.rate)
            loss = None if case.rate > 0.03 else abs(math.log(case.rate / 0.004))  # above it diverges; 0.004 is best
            (tmp_path / case.name).mkdir()
            result = {"arm": case.arm, "seed": case.seed, "rate": case.rate, "losses": {str(case.ends[0]): loss}}
            (tmp_path / case.name / RESULT).write_text(json.dumps(result))
            assert case.seed == 100
    assert found == (0.005, []) and tried == [0.01, 0.02, 0.005, 0.0025]


def test_a_queue_killed_on_the_way_ends_as_if_it_had_not_been(tmp_path, data):
    out = tmp_path / "out"
    worker = FORK.Process(target=work, args=(out, data))
    worker.start()
    while not (out / "shallow-seed_1" / "to_000004" / "checkpoints").exists():  # shared is done, shallow half-way
        assert worker.is_alive()
        worker.join(0.01)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.join()
    done = (out / "shared-seed_1" / RESULT).stat().st_mtime_ns
    assert not (out / "shallow-seed_1" / RESULT).exists()
    again = FORK.Process(target=work, args=(out, data))
    again.start()
    again.join()
    assert again.exitcode == 0, (out / "shallow-seed_1" / "output.txt").read_text()
    assert (out / "shared-seed_1" / RESULT).stat().st_mtime_ns == done

    # A budget's decay from the plateau's checkpoint is the run that had this schedule from its start.
    ladder = Ladder(PROTOCOL, data, out, "a commit", FORK)
    (_, _), (shallow, result) = every_result(ladder)
    assert shallow.ends == (4, 5, 8, 11) and set(result["losses"]) == {"4", "5", "8", "11"}
    said = (out / "shallow-seed_1" / "output.txt").read_text()
    assert "shallow-seed_1/to_000005/checkpoints/step_00000004 at step 4" in said
    alone = tmp_path / "alone"
    words = [
        *("train", "recipes/ladder/shallow.yaml", *PROTOCOL.settings, f"data.folder={data}", f"run.folder={alone}"),
        *("seed=1", "data.order_seed=1", "optimizer.learning_rate=0.01", "optimizer.cooldown_steps=1", "run.steps=5"),
    ]
    straight = FORK.Process(target=_train, args=(words, tmp_path / "log"))
    straight.start()
    straight.join()
    lines = [json.loads(line) for line in (alone / "log.jsonl").read_text().splitlines()]
    assert [line["held_out_loss"] for line in lines if "held_out_loss" in line] == [result["losses"]["5"]]

    text = report(ladder)
    assert "2 of 2 runs; commit a commit." in text
    rows = csv.DictReader((out / "ladder.csv").read_text().splitlines())
    at = {(row["arm"], row["meets"], row["steps"]): row for row in rows}
    ours, theirs = at["shared", "FLOPs", "8"], at["shallow", "FLOPs", "11"]
    difference = float(theirs["held_out_loss"]) - float(ours["held_out_loss"])
    assert float(theirs["minus_shared"]) == pytest.approx(difference) != 0
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_interval_is_students():
    """Of two pairs: 12.706 standard errors, from any table of t."""
    mean, half = mean_interval([0.01, 0.03])
    assert (mean, half) == (pytest.approx(0.02), pytest.approx(12.7062 * 0.01, rel=1e-4))
