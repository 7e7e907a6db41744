"""Rank maps from Slurm's variables, the rendezvous port, and binding to processors near a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_patch import launch

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "dgx[03-04,11]",
}

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_a_slurm_step_becomes_ranks() -> None:
    environment = dict(STEP)
    launch.setup_environment(environment)
    place = {k: v for k, v in environment.items() if not k.startswith("SLURM")}
    assert place == {
        "RANK": "13",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "5",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "dgx03",
        "MASTER_PORT": str(10_000 + 1234567 % 20_000),
    }


def test_the_launcher_s_master_and_torchrun_s_ranks_are_kept() -> None:
    environment = {**STEP, "MASTER_ADDR": "dgx11"}
    launch.setup_environment(environment)
    assert environment["MASTER_ADDR"] == "dgx11"
    torchrun = {**STEP, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    launch.setup_environment(torchrun)
    assert (torchrun["RANK"], torchrun["WORLD_SIZE"]) == ("3", "4")


def test_a_master_that_is_set_to_nothing_is_as_one_that_is_not_set() -> None:
    environment = {**STEP, "MASTER_ADDR": "", "MASTER_PORT": ""}
    launch.setup_environment(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("dgx03", str(10_000 + 1234567 % 20_000))


def test_a_batch_script_waits_for_nobody() -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "160"}
    launch.setup_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("dgx[03-05,9],login1", "dgx03"),
        ("n7", "n7"),
        ("a1,a2", "a1"),
        ("rack[2]-gpu,x", "rack2-gpu"),
        ("h-1-[5,2]", "h-1-5"),
    ],
)
def test_first_host(nodelist: str, first: str) -> None:
    assert launch.first_host(nodelist) == first


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"WORLD_SIZE": None}, "RANK is set in the environment, but WORLD_SIZE is not"),
        ({"LOCAL_RANK": None}, "RANK is set in the environment, but LOCAL_RANK is not"),
        ({"LOCAL_WORLD_SIZE": None}, "RANK is set in the environment, but LOCAL_WORLD_SIZE is not"),
        ({"RANK": "first"}, "RANK is 'first' in the environment, not a number"),
        ({"RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2"),
    ],
)
def test_half_a_place_among_the_ranks_is_refused(changes: dict[str, str | None], reason: str) -> None:
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **changes}
    with pytest.raises(launch.LaunchError, match=f"{reason}.*torchrun"):
        launch.setup_environment({name: value for name, value in place.items() if value is not None})


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment, but RANK is not; .*unset WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set in the environment, but RANK is not"),
        ({**STEP, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is set in the environment, but RANK is not"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is '4' .*mpirun .*torchrun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE is '2'"),
        ({"PMI_RANK": "1"}, "PMI_RANK is '1' .*unset PMI_RANK"),
        ({"PMIX_RANK": "2", "PMIX_NAMESPACE": "x"}, "PMIX_RANK is '2'"),
        ({"MPI_LOCALNRANKS": "2"}, "MPI_LOCALNRANKS is '2'"),
        ({"PALS_RANKID": "3"}, "PALS_RANKID is '3'"),
        ({"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE is ''"),
        ({**STEP, "MASTER_PORT": "x"}, "MASTER_PORT is 'x' .*unset SLURM_STEP_ID"),
        ({**STEP, "SLURM_NODEID": "-1"}, "SLURM_NODEID is -1"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "8(x9999999999)"}, "is of 9999999999 nodes"),
        ({**STEP, "SLURM_PROCID": "0"}, "LOCAL_RANK is 5, but RANK is 0"),
        ({**TORCHRUN, "RANK": "0"}, "LOCAL_RANK is 1, but RANK is 0"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK is 1, but RANK is 3 on the only node"),
        ({**TORCHRUN, "RANK": "\u0663"}, "not a number"),
        ({"SLURM_STEP_ID": "0"}, "SLURM_STEP_ID is set in the environment, but SLURM_STEP_TASKS_PER_NODE is not"),
        ({k: v for k, v in STEP.items() if k != "SLURM_PROCID"}, "but SLURM_PROCID is not"),
        ({**STEP, "SLURM_NODEID": "7"}, "do not describe a step"),
        ({**STEP, "SLURM_PROCID": "20"}, "RANK is 20, but WORLD_SIZE is 20"),
        ({**TORCHRUN, "MASTER_PORT": "29500x"}, "MASTER_PORT is '29500x' in the environment, not a port"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8, but WORLD_SIZE is 4"),
        ({**TORCHRUN, "WORLD_SIZE": "9" * 5000}, "not a number"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_what_another_launcher_has_left_is_refused(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(launch.LaunchError, match=reason):
        launch.setup_environment(dict(environment))


def test_ports_of_neighbouring_jobs_differ_and_stay_out_of_the_ephemeral_range() -> None:
    ports = [launch.job_port(j) for j in range(995_000, 1_015_000)]
    assert len(set(ports)) == len(ports)
    assert min(ports) > 1024 and max(ports) < 32768


def test_tensor_groups_stay_inside_a_node() -> None:
    launch.check_rank_map(tensor=4, local_world_size=8)
    with pytest.raises(ValueError, match=r"8 / 3 = 2\.66667.*choose a divisor of 8"):
        launch.check_rank_map(tensor=3, local_world_size=8)


@pytest.fixture
def two_gpus_on_one_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node's driver and bus as files: GPU 0 elsewhere, GPUs 1 and 2 beside all processors of this machine."""
    processors = sorted(os.sched_getaffinity(0))
    for bus, near in ((1, "4096-4103"), (2, ",".join(map(str, processors))), (3, ",".join(map(str, processors)))):
        device = tmp_path / f"bus/pci/devices/0000:0{bus}:00.0"
        device.mkdir(parents=True)
        (device / "local_cpulist").write_text(near + "\n")
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf '00000000:01:00.0\\n00000000:02:00.0\\n00000000:03:00.0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    return tmp_path


def test_gpus_of_a_socket_share_its_processors(two_gpus_on_one_socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    try:
        shares = []
        for local_rank in (0, 1):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
            shares.append(launch.bind_to_gpu(local_rank, two_gpus_on_one_socket))
            assert os.sched_getaffinity(0) == (shares[-1] or before)
            os.sched_setaffinity(0, before)
        assert shares[0] | shares[1] == before
        assert not shares[0] & shares[1]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert launch.bind_to_gpu(1, two_gpus_on_one_socket) == set()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert launch.bind_to_gpu(0, two_gpus_on_one_socket) == set()
        assert launch.bind_to_gpu(1, two_gpus_on_one_socket) == shares[0]
        assert launch.bind_to_gpu(1, two_gpus_on_one_socket / "hidden") == set()
    finally:
        os.sched_setaffinity(0, before)


def test_without_a_driver_nothing_is_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.bind_to_gpu(0) == set()


def test_snapshot_holds_what_an_attempt_ran_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5_0")
    monkeypatch.setenv("HOME_SECRET", "not for the record")
    taken = launch.snapshot({"name": "x"}, ["dgx01"])
    assert taken["recipe"] == {"name": "x"} and taken["nodes"] == ["dgx01"]
    assert taken["packages"]["pydantic"]
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert taken["git"] == revision.stdout.strip()  # none in a tarball
    assert taken["variables"]["NCCL_IB_HCA"] == "mlx5_0"
    assert "HOME_SECRET" not in str(taken)
    launch.write_json(tmp_path / "environment/attempt_1.json", taken)
    assert [p.name for p in (tmp_path / "environment").iterdir()] == ["attempt_1.json"]


@pytest.mark.skipif(shutil.which("git") is None, reason="the record names no revision where there is no git")
def test_the_revision_is_recorded_whoever_owns_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for this
    (tmp_path / "megatron_patch").mkdir()
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "megatron_patch/launch.py"))
    author = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", f"safe.directory={tmp_path}"]
    for arguments in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=first"]):
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True)
    assert len(launch.snapshot({})["git"]) == 40
