"""Every verb has its module and says what it takes."""

import os
import re
import signal
import subprocess
import sys

import pytest

from megatron_patch.__main__ import VERBS, main
from megatron_patch.launch import write_json


@pytest.fixture(autouse=True)
def my_own_signals():
    """`train` takes over signals, which belong to pytest here."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: python -m megatron_patch {verb}" in told
    assert f"-m megatron_patch {verb} " in told[told.index("\nexample:") :], "a whole command"


def test_no_help_and_no_plan_waits_for_torch():
    asked = [[verb, "--help"] for verb in VERBS] + [["plan", "recipes/mobillama_05b.yaml"], ["plan"]]
    program = (
        f"import contextlib, sys\nfrom megatron_patch.__main__ import main\nfor words in {asked}:\n"
        "    with contextlib.suppress(SystemExit):\n        main(words)\n"
        "    heavy = {'torch', 'megatron', 'deepspeed', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)


def test_unknown_verb_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "plan --nodes 0",
        "plan --mfu nan",
        "report --compare recipes/demo.yaml --nodes 0",
        "report --compare recipes/demo.yaml --mfu 0",
        "report --compare recipes/demo.yaml --mfu nan",
        "eval RUN --limit 0",
        "eval RUN --batch-size -1",
        "eval RUN --watch --every -1",
        "eval RUN --watch --patience nan",
        "loss_compare A B --bound nan",
        "summary RUN --tokens 0",
        "check recipes/demo.yaml --slow 2",
        "chat RUN --temperature 1e-40",
        "chat RUN --seed 99999999999999999999",
        "report RUN --output tests",
        "report RUN --output nowhere/report.html",
        "report RUN --evaluations Makefile",
        "export CHECKPOINT out.gguf --form gguf --evaluations Makefile",
        "plan recipes/demo.yaml --output tests",
        "device CHECKPOINT FORM --csv tests",
        "eval --table Makefile",
    ],
)
def test_a_number_or_path_that_cannot_be_used_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert re.search(r"error: argument --[\w-]+: .* is needed", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["eval", "--table", ""], "--table"),
        (["export", "", "out", "--form", "gguf"], "argument 1"),
        (["export", "a", " ", "--form", "gguf"], "argument 2"),
        (["report", "run", "--output="], "--output"),
        (["status", ""], "argument 1"),
        (["train", "recipes/demo.yaml", ""], "argument 2"),
    ],
)
def test_a_variable_that_is_not_set_means_no_folder(words, what, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"{words[0]}: {what} is empty (a variable that is not set?); give it a value, or leave it out\n"
    )


def test_a_rank_without_a_world_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["check", "recipes/demo.yaml"]) == 2
    assert "refused: RANK is set in the environment, but WORLD_SIZE is not" in capsys.readouterr().err


def test_a_file_of_the_system_that_is_in_the_way_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["status", str(tmp_path / "file" / "status.json")]) == 2
    assert main(["report", str(tmp_path / "file" / "run")]) != 0
    told = capsys.readouterr().err
    assert "Traceback" not in told and str(tmp_path / "file") in told


def test_a_reader_who_has_seen_enough_is_no_error():
    plan = [sys.executable, "-m", "megatron_patch", "plan"]
    with subprocess.Popen(plan, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        job.stdout.close()
        assert "Traceback" not in job.stderr.read() and "Error" not in job.stderr.read()


def test_an_empty_prompt_is_refused(tmp_path, capsys):
    assert main(["summary", str(tmp_path), "--prompt", ""]) == 2
    assert "--prompt is empty" in capsys.readouterr().err


def test_a_terminal_that_cannot_show_a_letter_shows_another(tmp_path):
    write_json(tmp_path / "läuft/status.json", {"state": "completed", "step": 5, "updated": 0.0})
    status = [sys.executable, "-m", "megatron_patch", "status", str(tmp_path / "läuft")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told = subprocess.run(status, capture_output=True, env=environment, check=True).stdout
    assert b"l?uft" in told and b"completed" in told
