"""The pretraining template to its end, disturbed in every way that a cluster knows.

Each disturbed run must be complete, have every step once in its accepted history, and hold weights bit-equal to those
of a run of the same layout that was left alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from site_folder import Site
from slurm_cluster import Cluster, wait_for

STEPS = 400
DISTURB_AT = 100


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Cluster:
    """A partition that may take nodes from the other, and quick to notice a dead node."""
    partitions = (
        "PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60",
        "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2",
    )
    extra = ("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE")
    with Cluster(scratch / "training", nodes=4, partitions=partitions, extra=extra) as running:
        yield running


@pytest.fixture
def site(cluster: Cluster, scratch: Path, data: Path, request: pytest.FixtureRequest) -> Site:
    return make_site(cluster, scratch / request.node.name, data)


def make_site(cluster: Cluster, folder: Path, data: Path) -> Site:
    edits = {"SITE_DATA=$SITE_REPOSITORY/data/amber ": f"SITE_DATA={data} ", "SITE_PREFLIGHT=yes": "SITE_PREFLIGHT=no"}
    return Site(cluster, folder, STEPS, edits)


def submit(site: Site, *options: str, arguments: tuple[str, ...] = ()) -> int:
    return site.submit("pretrain_05b.sbatch", "--nodes=2", *options, arguments=arguments)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, scratch: Path, data: Path) -> Site:
    site = make_site(cluster, scratch / "undisturbed", data)
    site.finish(submit(site))
    return site


def test_a_run_left_alone_completes(undisturbed: Site) -> None:
    assert undisturbed.status()["state"] == "completed"
    history = undisturbed.accepted()
    assert [step for step, *_ in history] == list(range(1, STEPS + 1))
    assert len(undisturbed.steps()) == STEPS
    assert history[-1][1] < history[0][1], "the loss fell"


def check_like(site: Site, undisturbed: Site, output: str, attempts: int) -> None:
    assert site.status()["state"] == "completed", output
    assert len(list((site.run_folder() / "environment").glob("attempt_*.json"))) == attempts, output
    assert site.accepted() == undisturbed.accepted()
    assert site.weights() == undisturbed.weights()


def test_requeue_by_the_admin(site: Site, undisturbed: Site) -> None:
    job = submit(site, "--export=NONE")  # nothing of the submitting shell; all that site.sh and the launcher set
    site.wait_for_step(job, DISTURB_AT)
    hosts = site.cluster.hosts(job)
    variables = site.cluster.rank_environment(hosts[1])
    assert variables["MASTER_ADDR"] == hosts[0]
    assert (variables["OMP_NUM_THREADS"], variables["NCCL_IB_TIMEOUT"], variables["NCCL_DEBUG"]) == ("1", "22", "WARN")
    assert variables["CUDA_VISIBLE_DEVICES"] == "", "a GPU of this machine"
    for name in ("NCCL_DEBUG_FILE", "TORCH_FR_DUMP_TEMP_FILE"):
        assert Path(variables[name]).parent == site.run_folder() / "logs/attempt_1/nccl"
    site.cluster.command("scontrol", "requeue", str(job))
    output = site.finish(job)
    check_like(site, undisturbed, output, attempts=2)


def test_a_cancelled_job_stays_cancelled(site: Site, undisturbed: Site) -> None:
    """Its ranks save a checkpoint; submitted again, it goes on from there."""
    job = submit(site)
    site.wait_for_step(job, DISTURB_AT)
    site.cluster.command("scancel", str(job))
    wait_for(lambda: "Slurm has ended this job" in site.output(job), "the launcher's last word", 30)
    output = site.finish(job, expected="CANCELLED")
    assert site.status()["state"] == "stopped", output
    job = submit(site)
    output = site.finish(job)
    assert "resuming from" in output
    check_like(site, undisturbed, output, attempts=2)


def test_time_limit(site: Site, undisturbed: Site) -> None:
    """The early signal, sent by Slurm itself: the job checkpoints and puts itself back before the limit."""
    # Slurm looks at time limits every 30 s, so the signal comes 15 to 45 s after the start. Until then a rank is held.
    job = submit(site, "--time=2", "--signal=B:USR1@75", arguments=("watchdog.hang_minutes=5",))
    site.wait_for_step(job, DISTURB_AT)
    node = site.cluster.hosts(job)[1]
    site.cluster.signal_rank(node, "STOP")
    wait_for(lambda: "asked to stop" in site.output(job), "Slurm's early signal", 60)
    site.cluster.signal_rank(node, "CONT")
    wait_for(lambda: site.cluster.job(job)["Restarts"] == "1", "the job to put itself back", 60)
    site.cluster.command("scontrol", "update", f"jobid={job}", "timelimit=60")
    output = site.finish(job)
    # The rank that was held may learn of it from the other one.
    assert re.search("SIGUSR1 on [12] of 2 ranks", output)
    check_like(site, undisturbed, output, attempts=2)


def test_a_node_loses_power(site: Site, undisturbed: Site) -> None:
    job = submit(site)
    site.wait_for_step(job, DISTURB_AT)
    node = site.cluster.hosts(job)[1]
    site.cluster.cut_power(node)
    output = site.finish(job)
    site.cluster.start_node(node)
    check_like(site, undisturbed, output, attempts=2)


def test_two_nodes_lose_power_at_once(site: Site, undisturbed: Site) -> None:
    """Slurm 22.05 then starts the job without its GPUs, and takes its new nodes' for used until slurmctld restarts."""
    cluster = site.cluster
    job = submit(site)
    site.wait_for_step(job, DISTURB_AT)
    nodes = cluster.hosts(job)
    for node in nodes:
        cluster.cut_power(node)
    wait_for(lambda: cluster.job(job)["Restarts"] != "0", "Slurm to put the job back", 60)
    for node in nodes:
        cluster.start_node(node)
    output = site.finish(job)
    cluster.kill_controller()
    cluster.start_controller()
    check_like(site, undisturbed, output, attempts=2)


def test_a_node_is_drained(site: Site, undisturbed: Site) -> None:
    """A draining node keeps its job; the next attempt goes elsewhere."""
    job = submit(site)
    site.wait_for_step(job, DISTURB_AT)
    drained = site.cluster.hosts(job)[0]
    site.cluster.command("scontrol", "update", f"nodename={drained}", "state=drain", "reason=test")
    site.cluster.command("scontrol", "requeue", str(job))
    site.cluster.wait_job(job, "RUNNING", timeout=60)
    assert drained not in site.cluster.hosts(job)
    output = site.finish(job)
    site.cluster.command("scontrol", "update", f"nodename={drained}", "state=resume")
    check_like(site, undisturbed, output, attempts=2)


def test_the_controller_restarts(site: Site, undisturbed: Site) -> None:
    """The run goes on without it; a rank that dies meanwhile is started again when the controller is back."""
    job = submit(site)
    site.wait_for_step(job, DISTURB_AT)
    site.cluster.kill_controller()
    site.cluster.start_controller()
    site.wait_for_step(job, 2 * DISTURB_AT)
    node = site.cluster.hosts(job)[1]
    site.cluster.kill_controller()
    site.cluster.signal_rank(node, "KILL")
    wait_for(lambda: "controller does not answer" in site.output(job), "the launcher to wait for the controller", 120)
    site.cluster.start_controller()
    output = site.finish(job)
    check_like(site, undisturbed, output, attempts=2)


def test_preemption(site: Site, undisturbed: Site) -> None:
    """A more urgent job takes the nodes; the run has its grace time to checkpoint, and comes back after it."""
    job = submit(site)
    site.wait_for_step(job, DISTURB_AT)
    hosts = ",".join(site.cluster.hosts(job))
    urgent = ["--partition=urgent", f"--nodelist={hosts}", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    site.cluster.command("sbatch", "--nodes=2", *urgent)
    output = site.finish(job)
    assert "SIGTERM or Ctrl-C on" in output
    check_like(site, undisturbed, output, attempts=2)


def test_a_rank_is_killed(site: Site, undisturbed: Site) -> None:
    job = submit(site)
    site.wait_for_step(job, DISTURB_AT)
    site.cluster.signal_rank(site.cluster.hosts(job)[1], "KILL")
    output = site.finish(job)
    check_like(site, undisturbed, output, attempts=2)


def test_a_rank_hangs(site: Site, undisturbed: Site) -> None:
    job = submit(site)
    site.wait_for_step(job, DISTURB_AT)
    site.cluster.signal_rank(site.cluster.hosts(job)[1], "STOP")
    output = site.finish(job)
    check_like(site, undisturbed, output, attempts=2)
    # The rank that waited for it left its stack, in the step; the launcher's second attempt set it aside.
    assert "train/step.py" in (site.run_folder() / "stacks/rank_00000.previous.txt").read_text()
