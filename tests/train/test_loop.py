"""The command: bad input is refused before the first step; a rank that dies ends the job."""

import argparse
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from data_tools.dataset.format import TokenizerRecord, segment_name
from data_tools.dataset.segment_files import DatasetPlan, write_dataset_manifest
from data_tools.files.digest import sha256_file
from megatron_patch import launch
from megatron_patch.launch import LaunchError
from megatron_patch.parallel import topology
from megatron_patch.recipe import load
from megatron_patch.train import loop
from tests.data.conftest import write_rows
from tests.ranks import run_ranks
from tests.toy import TOY

ROW_LENGTH, VOCAB, ROWS, SEGMENTS = 17, 64, 100, 2


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "tokenizer.json").write_text("{}")
    record = TokenizerRecord("tokenizer.json", sha256_file(folder / "tokenizer.json"), VOCAB)
    plan = DatasetPlan(SEGMENTS, ROW_LENGTH, VOCAB, record, has_held_out=True)
    random = np.random.RandomState(0)
    for name in [*(segment_name(k) for k in range(SEGMENTS)), "held_out"]:
        rows = random.randint(0, VOCAB, (ROWS, ROW_LENGTH)).astype("<u2")
        write_rows(folder / name, rows, np.zeros(ROWS, np.uint8), plan)
    write_dataset_manifest(folder, plan)
    return folder


def run_main(overrides: list[str]) -> tuple[int, str]:
    """Exit code and standard error of `train recipes/demo.yaml OVERRIDES` on this rank."""
    errors = io.StringIO()
    with redirect_stderr(errors):
        code = loop.main(
            argparse.Namespace(recipe=Path("recipes/demo.yaml"), overrides=overrides, accept_changes=False)
        )
    return code, errors.getvalue()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.folder=nowhere"], r"nowhere/manifest.json"),
        (["data.folder=null"], "data.folder: not set"),
        (["model.sequence_length=32"], r"manifest.json: row_length: rows of 17 ids, .* needs 33"),
        (["model.vocab_size=32"], r"manifest.json: vocab_size: a vocabulary of 64, but the model has 32"),
        (["batch.global_batch_size=101"], r"100 rows a segment are fewer than one global batch of 101"),
        (["run.steps=1000"], r"holds 24 steps of 8 rows \(12 a segment\), the recipe asks for 1,000"),
        (["data.held_out_rows=101"], r"100 held-out rows, the recipe scores 101"),
        (["parallel.tensor=2"], r"1 ranks / \(parallel.tensor 2 x parallel.pipeline 1\) = 0.5"),
        (["model.typo=1"], "model.typo: unknown key"),
    ],
)
def test_refused_before_the_first_step(data_folder, tmp_path, overrides, message):
    settings = [*TOY, f"data.folder={data_folder}", f"run.folder={tmp_path / 'run'}", "run.steps=4", *overrides]
    code, errors = run_ranks(1, run_main, settings)[0]
    assert code == 2
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_torchrun_repeats_why_at_its_end(data_folder, tmp_path, monkeypatch):
    """Its own traceback follows ours; what it prints last is what a person reads."""
    file = tmp_path / "attempt_0" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    settings = [*TOY, f"data.folder={data_folder}", f"run.folder={tmp_path / 'run'}", "run.steps=1000"]
    code, errors = run_ranks(1, run_main, settings)[0]
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(file))
    last_words = ChildFailedError("train", {0: failure}).format_msg()
    assert "holds 24 steps of 8 rows" in errors
    for line in errors.splitlines():
        assert line in last_words


def meet(rank: int, restart: int, port: int, met: Connection) -> None:
    """A rank of two under torchrun, whose agent keeps the store; it stays until it is killed."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    place |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": restart}
    os.environ.update({name: str(value) for name, value in place.items()})
    topology.join(load("recipes/demo.yaml", TOY).parallel)
    ones = torch.ones(1)
    torch.distributed.all_reduce(ones)
    met.send(ones.item())
    signal.pause()


def test_ranks_that_torchrun_starts_again_meet_again():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    for restart in range(2):
        receive, send = fork.Pipe(duplex=False)
        ranks = [fork.Process(target=meet, args=(r, restart, store.port, send), daemon=True) for r in range(2)]
        left = store.num_keys()
        try:
            ranks[0].start()
            deadline = time.monotonic() + 20
            while store.num_keys() == left:  # it has published nothing, or in place of what a rank before it left
                assert time.monotonic() < deadline, f"restart {restart} shares the keys of the start before"
                time.sleep(0.005)
            ranks[1].start()
            for _ in ranks:
                assert receive.poll(20) and receive.recv() == 2
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()


def groups_without_files() -> tuple[str, bool]:
    """What is said where groups find no file to open, and whether the limit is as high as it may be afterwards."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())), most))
    try:
        topology.initialize(load("recipes/demo.yaml", TOY).parallel)
        said = ""
    except LaunchError as error:
        said = str(error)
    launch.raise_file_limit()
    return said, resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)


def test_groups_that_cannot_be_made_say_what_they_need():
    said, is_high = run_ranks(1, groups_without_files)[0]
    assert re.search(r"process groups cannot be made on .*: .*Too many open files.*`ulimit -n`", said, re.DOTALL), said
    assert is_high


def join_with_little_address_space(said: Connection) -> None:
    """As rank 0 of 1, with room for some threads and not for those of all groups."""
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in place.items()})
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 100 * 2**20, resource.RLIM_INFINITY))
    try:
        topology.join(load("recipes/demo.yaml", TOY).parallel)
    except LaunchError as error:
        said.send(str(error))


def test_threads_that_cannot_be_started_are_not_waited_for():
    receive, send = multiprocessing.Pipe(duplex=False)
    rank = multiprocessing.get_context("fork").Process(target=join_with_little_address_space, args=(send,), daemon=True)
    rank.start()
    try:
        assert receive.poll(30)
        assert re.match(r"can't start new thread beside \d+ on .*`ulimit -v`", receive.recv())
    finally:
        rank.kill()
        rank.join()


def test_kernels_that_cannot_run_here_are_refused(data_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = tmp_path / "run"
    settings = [*TOY, f"data.folder={data_folder}", f"run.folder={run}", "run.steps=4", "kernels=triton"]
    code, errors = run_ranks(1, run_main, settings)[0]
    assert code == 2
    assert re.search("refused: kernel .* cannot run here as triton: .*; use kernels=auto", errors), errors
    assert json.loads((run / "status.json").read_text())["reason"].startswith("refused: kernel ")


def test_a_damaged_row_ends_the_run_with_its_place(data_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data_folder, folder)
    path = folder / f"{segment_name(0)}.bin"
    content = np.fromfile(path, "<u2").reshape(ROWS, ROW_LENGTH)
    content[:, 3] = VOCAB
    content.tofile(path)
    settings = [*TOY, f"data.folder={folder}", f"run.folder={tmp_path / 'run'}", "run.steps=4"]
    code, errors = run_ranks(1, run_main, settings)[0]
    assert code == 1
    assert re.search(rf"stopped on rank 0: .*{segment_name(0)}.bin: row \d+, position 3: id {VOCAB} is beyond", errors)
    assert "beyond the vocabulary" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]


def test_a_rank_that_dies_ends_the_job_with_its_error_shown(data_folder, tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_patch", "train", "recipes/demo.yaml", *TOY, "parallel.pipeline=2"),
        *(f"data.folder={data_folder}", f"run.folder={tmp_path / 'run'}", "run.steps=null", "data.held_out_interval=0"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert job.stdout is not None
    try:
        output = []
        for line in job.stdout:
            output.append(line)
            if line.startswith("step "):
                break
        else:
            pytest.fail("".join(output))
        victim = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[1])
        os.kill(victim, signal.SIGKILL)
        died = time.monotonic()
        output.append(job.communicate(timeout=60)[0])
        assert time.monotonic() - died < 60
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    assert re.search(rf"pid[: ]+{victim}", "".join(output)) and "SIGKILL" in "".join(output)
