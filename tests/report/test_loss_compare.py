"""loss_compare: what it accepts, what it refuses, and that two runs of one recipe are the same bits."""

import argparse
import json

import pytest

from megatron_patch.report import loss_compare
from tests.ranks import run_ranks
from tests.toy import train_toy


def write(path, losses, norms=None, held_out=None):
    lines = [{"step": i, "loss": x, "grad_norm": (norms or losses)[i - 1]} for i, x in enumerate(losses, 1)]
    lines += [{"step": s, "held_out_loss": x} for s, x in (held_out or {}).items()]
    path.mkdir(exist_ok=True)
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments):
    parser = argparse.ArgumentParser()
    loss_compare.add_arguments(parser)
    return loss_compare.main(parser.parse_args([str(a) for a in arguments]))


def test_equal_runs(tmp_path, capsys):
    a = write(tmp_path / "a", [3.0, 2.0], held_out={2: 2.5})
    assert run(a, a / "log.jsonl", "--assert-equal") == 0
    assert "2 steps, 2 equal" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["loss", "norm", "held out"])
def test_one_bit_is_a_difference(tmp_path, which, capsys):
    a = write(tmp_path / "a", [3.0, 2.0], [1.0, 1.0], {2: 2.5})
    off = 1 + 2**-52
    b = write(
        tmp_path / "b",
        [3.0, 2.0 * (off if which == "loss" else 1)],
        [1.0, off if which == "norm" else 1.0],
        {2: 2.5 * (off if which == "held out" else 1)},
    )
    assert run(a, b, "--assert-equal") == 1
    assert "first difference at step 2" in capsys.readouterr().out
    assert run(a, b, "--bound", "1e-12") == 0
    assert run(a, b) == 0


def test_bound(tmp_path):
    a, b = write(tmp_path / "a", [2.0, 2.02]), write(tmp_path / "b", [2.0, 2.0])
    assert run(a, b, "--bound", "0.009") == 1
    assert run(a, b, "--bound", "0.011") == 0
    assert run(a, b, "--bound", "0.009", "--steps", 1) == 0


def test_a_run_is_scored_at_its_end_which_need_not_be_the_others_turn(tmp_path, capsys):
    a = write(tmp_path / "a", [5.0, 4.0, 3.0], held_out={1: 5.0, 3: 3.0})
    b = write(tmp_path / "b", [5.0, 4.0], held_out={1: 5.0, 2: 4.0})
    for pair in ((a, b), (b, a)):
        assert run(*pair, "--assert-equal") == 0
        assert "held_out_loss        1 steps, 1 equal" in capsys.readouterr().out
    c = write(tmp_path / "c", [5.0, 4.0], held_out={2: 4.0})
    assert run(c, b) == 2
    assert "step 1: held_out_loss is in one log only" in capsys.readouterr().err


def test_what_is_not_finite(tmp_path):
    a, b = write(tmp_path / "a", [2.0, None]), write(tmp_path / "b", [2.0, 2.0])
    assert run(a, b, "--bound", "1e9") == 1
    assert run(b, a, "--bound", "1e9") == 1
    assert run(a, a, "--assert-equal") == 0


def test_a_resumed_run_counts_its_last_words(tmp_path):
    a, b = write(tmp_path / "a", [3.0, 2.0]), write(tmp_path / "b", [3.0, 9.0])
    with (b / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 2, "loss": 2.0, "grad_norm": 2.0}) + "\n")
    assert run(a, b, "--assert-equal") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "without a single step"),
        ('{"step": 1, "loss": 1.0', "log.jsonl, line 1: not a line"),
        ('{"loss": 1.0}', "line 1: not a line"),
        ('{"step": 2, "loss": 1.0, "grad_norm": 1.0}', "step 1: loss is in one log only"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, text, message):
    a = write(tmp_path / "a", [3.0, 2.0])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "log.jsonl").write_text(f"{text}\n" if text else "")
    assert run(a, tmp_path / "b") == 2
    assert message in capsys.readouterr().err
    assert run(a, a, "--steps", 3) == 2


def test_two_runs_of_one_recipe_are_the_same_bits(tmp_path):
    runs = []
    for name in ("first", "second"):
        answer = run_ranks(2, train_toy, ["precision=bf16", "model.num_ffns=1"], 4)[0]
        runs.append(write(tmp_path / name, answer["losses"], answer["norms"]))
    assert run(*runs, "--assert-equal") == 0


@pytest.mark.parametrize(
    "demand", [["--steps", "0"], ["--steps", "-3"], ["--bound", "nan"], ["--bound", "-1"], ["--bound", "inf"]]
)
def test_a_demand_that_everything_meets_is_refused(tmp_path, demand, capsys):
    a, b = write(tmp_path / "a", [3.0, 2.0]), write(tmp_path / "b", [9.0, 9.0])
    with pytest.raises(SystemExit) as ended:
        run(a, b, *demand)
    assert ended.value.code == 2
    assert "is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [b"[1]", b'{"step": "1", "loss": 2.0}', b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": [2.0]}', b"\xff\xfe"],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, capsys):
    a, b = write(tmp_path / "a", [3.0, 2.0]), write(tmp_path / "b", [3.0, 2.0])
    with (b / "log.jsonl").open("ab") as log:
        log.write(line + b"\n")
    assert run(a, b) == 2
    assert f"{b / 'log.jsonl'}, line 3: not a line of a log.jsonl" in capsys.readouterr().err


def test_a_run_in_progress_is_compared_as_far_as_it_is(tmp_path, capsys):
    a, b = write(tmp_path / "a", [3.0, 2.0]), write(tmp_path / "b", [3.0])
    with (b / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')
    assert run(a, b, "--assert-equal") == 0
    assert "1 steps, 1 equal" in capsys.readouterr().out


def test_not_a_number_is_no_number_within_a_bound(tmp_path):
    a, b = write(tmp_path / "a", [3.0]), write(tmp_path / "b", [None], [3.0])
    assert run(a, b, "--bound", "1") == 1
