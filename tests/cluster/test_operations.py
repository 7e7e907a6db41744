"""What an admin does around a run: the smoke job, stopping, giving up, chaining, losing a node, building the data."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from site_folder import NUM_SEGMENTS, SHAPE, Site, write_raw_rows
from slurm_cluster import Cluster, wait_for


def make_site(cluster: Cluster, folder: Path, data: Path, steps: int = 60, preflight: str = "no") -> Site:
    edits = {
        "SITE_DATA=$SITE_REPOSITORY/data/amber ": f"SITE_DATA={data} ",
        "SITE_PREFLIGHT=yes": f"SITE_PREFLIGHT={preflight}",
    }
    return Site(cluster, folder, steps, edits)


def test_smoke_job_checks_trains_saves_requeues_and_resumes(cluster: Cluster, scratch: Path, data: Path) -> None:
    site = make_site(cluster, scratch / "smoke", data, preflight="yes")
    site.edit("SITE_RUNS=$SITE_REPOSITORY/runs ", "SITE_RUNS=$SITE_REPOSITORY/elsewhere ")
    job = site.submit("smoke.sbatch")
    output = site.finish(job, timeout=400)
    run = site.folder / f"elsewhere/smoke-{job}"
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("completed", 20), output
    assert output.count("checking 2 nodes") == 2, output
    assert output.count("putting the job back in the queue") == 1
    records = [json.loads(p.read_text()) for p in sorted((run / "environment").glob("attempt_*.json"))]
    assert [record["attempt"] for record in records] == [1, 2]
    assert 0 == records[0]["checkpoint_step"] < records[1]["checkpoint_step"] < 20
    assert records[0]["variables"]["CUDA_VISIBLE_DEVICES"] == "", "SITE_WRAPPER was used"
    assert len(records[0]["nodes"]) == 2 and records[0]["recipe"]["run"]["steps"] == 20
    sent = (cluster.root / "mail/sent").read_text()
    assert f"Job_id={job} Name=smoke" in sent and "COMPLETED" in sent


def test_a_stop_file_ends_the_run_with_a_checkpoint(cluster: Cluster, scratch: Path, data: Path) -> None:
    site = make_site(cluster, scratch / "stop", data, steps=400)
    job = site.submit("pretrain_05b.sbatch", "--nodes=2")
    site.wait_for_step(job, 50)
    (site.run_folder() / "STOP").touch()
    site.finish(job)
    status = site.status()
    assert status["state"] == "stopped" and "STOP exists; remove it" in status["reason"]
    assert (site.run_folder() / f"checkpoints/step_{status['step']:08d}/COMPLETE").exists()
    assert 50 <= status["step"] < 400


def test_what_the_site_must_mend_is_said_and_not_tried_again(cluster: Cluster, scratch: Path, data: Path) -> None:
    site = make_site(cluster, scratch / "unready", data)
    (site.folder / "runs").touch()
    output = site.finish(site.submit("pretrain_05b.sbatch", "--nodes=1"), expected="FAILED")
    assert f"refused: run.folder {site.folder}/runs/mobillama_05b: cannot be written" in output
    assert "Traceback" not in output
    (site.folder / "runs").unlink()
    job = site.submit("pretrain_05b.sbatch", "--nodes=1")
    wait_for(cluster.a_rank_runs, "Python to start, where no signal ends it any more", 60)
    cluster.command("scancel", "--batch", "--signal=USR1", str(job))
    output = site.finish(job, expected="FAILED")
    assert "given up: Slurm's early signal came before the first step: ask for more --time" in output
    assert site.status()["step"] == 1
    site.edit("SITE_RANKS_PER_NODE=1 ", "SITE_RANKS_PER_NODE=16 ")
    output = site.finish(site.submit("preflight.sbatch", "--nodes=1"), expected="FAILED")
    assert "refused: SITE_RANKS_PER_NODE is 16 in slurm/site.sh, the job has 8 GPUs a node" in output
    site.edit("SITE_ATTEMPTS=3 ", "SITE_ATTEMPTS= ")
    output = site.finish(site.submit("preflight.sbatch", "--nodes=1"), expected="FAILED")
    assert "refused: slurm/site.sh does not set SITE_ATTEMPTS" in output
    site.edit("PATH=", "module load CUDA && PATH=")
    for template in ("pretrain_05b.sbatch", "preflight.sbatch"):
        output = site.finish(site.submit(template, "--nodes=1"), expected="FAILED")
        assert "module: command not found" in output
        assert "refused: slurm/site.sh failed on dgx" in output
    job = site.submit("preflight.sbatch", "--nodes=1", "--hold")
    site_sh = site.folder / "slurm/site.sh"
    site_sh.write_bytes(site_sh.read_bytes().replace(b"\n", b"\r\n"))
    cluster.command("scontrol", "release", str(job))
    output = site.finish(job, expected="FAILED")
    assert "slurm/site.sh has Windows line ends" in output and "refused: slurm/site.sh failed on dgx" in output
    sourced = subprocess.run(
        ["bash", "-c", f". {shlex.quote(str(site_sh))}"], capture_output=True, text=True, check=False
    )
    assert (sourced.returncode, sourced.stderr) == (2, "slurm/site.sh has Windows line ends; dos2unix mends it\n")


def hold_a_step_of_the_check(site: Site) -> tuple[Path, Path]:
    """A file that is there once the first step of the check of dgx02 is held, and one that lets it go on."""
    held, opened = site.folder / "held", site.folder / "opened"
    quoted_held, quoted_opened = shlex.quote(str(held)), shlex.quote(str(opened))
    waits = f"touch {quoted_held}; until [[ -e {quoted_opened} ]]; do sleep 0.1; done"
    is_first = f'[[ $* == *"--nodelist=dgx02 "*" check "* && ! -e {quoted_held} ]]'
    site.put_before("srun", f'{is_first} && {{ {waits}; }}\nexec $real "$@"')
    return held, opened


def note_alerts(site: Site) -> Path:
    """A file that is there once somebody has been alerted."""
    local, alerts = "    local subject=$1 text=$2\n", site.folder / "alerts"
    site.edit(local, f'{local}    echo "$subject: $text" >>{shlex.quote(str(alerts))}; return\n')
    return alerts


def test_what_slurm_did_counts_and_not_what_its_clients_say_of_it(cluster: Cluster, scratch: Path, data: Path) -> None:
    """The requeue ends the client that asked for it; every step of the launcher's own ends badly behind its answer."""
    site = make_site(cluster, scratch / "clients", data, steps=200)
    alerts = note_alerts(site)
    site.put_before("scontrol", '[[ $1 == requeue ]] || exec $real "$@"\n$real "$@"; kill -TERM $$')
    site.put_before("srun", '[[ $* == *run.attempts* ]] || exec $real "$@"\n$real "$@"; exit 1')
    job = site.submit("pretrain_05b.sbatch", "--nodes=1")
    site.wait_for_step(job, 20)
    cluster.command("scancel", "--batch", "--signal=USR1", str(job))
    output = site.finish(job)
    assert "given up" not in output and not alerts.exists(), output
    assert output.count("putting the job back in the queue") == 1
    assert site.status()["state"] == "completed" and cluster.job(job)["Restarts"] == "1"


def test_a_client_that_says_nothing_or_half_is_asked_again(cluster: Cluster, scratch: Path, data: Path) -> None:
    """And what it says in the place of a refusal (as of 22.05, where the controller is too slow) is none."""
    site = make_site(cluster, scratch / "silent", data, steps=200)
    alerts = note_alerts(site)
    count = 'n=$(wc -l 2>/dev/null <"$0.$1"); echo >>"$0.$1"'
    show = f'[[ $* == *oneliner*show* ]] && {{ set -- show "$@"; {count}; shift; }}; case ${{n:-9}} in 0) exit 0;; '
    show += '1) echo "JobId=$SLURM_JOB_ID JobName=x"; exit 0;; 2) kill -KILL $$;; esac; unset n; '
    late = (
        f'[[ $1 == requeue ]] && {{ {count}; ((n < 4)) && {{ echo "Unexpected message received for job"; exit 1; }}; }}'
    )
    site.put_before("scontrol", f'{show}{late}; exec $real "$@"')
    job = site.submit("pretrain_05b.sbatch", "--nodes=1")
    site.wait_for_step(job, 20)
    cluster.command("scancel", "--batch", "--signal=USR1", str(job))
    output = site.finish(job)
    assert "given up" not in output and not alerts.exists(), output
    assert output.count("Slurm has not put this job back: Unexpected message") == 4, output
    assert output.count("Slurm does not say how this job stands (") == 3, output
    assert site.status()["state"] == "completed" and cluster.job(job)["Restarts"] == "1"


def test_what_slurm_refuses_to_put_back_is_given_up(cluster: Cluster, scratch: Path, data: Path) -> None:
    site = make_site(cluster, scratch / "refused", data, steps=400)
    alerts = note_alerts(site)
    job = site.submit("pretrain_05b.sbatch", "--nodes=1", "--no-requeue")
    site.wait_for_step(job, 20)
    cluster.command("scancel", "--batch", "--signal=USR1", str(job))
    output = site.finish(job, expected="FAILED")
    assert output.count("Slurm has not put this job back: Requested operation is presently disabled") == 3, output
    assert "given up: Slurm does not put this job back (--no-requeue?)" in output and alerts.exists()
    assert site.status()["state"] == "stopped"


def test_a_job_begins_while_the_controller_is_away(cluster: Cluster, scratch: Path) -> None:
    """A template asks it where launch.sh is, before anything of ours runs."""
    site, gate = Site(cluster, scratch / "begins"), scratch / "gate"
    held, opened = site.folder / "held", site.folder / "opened"
    gate.mkdir()
    waits = f"touch {shlex.quote(str(held))}; until [[ -e {shlex.quote(str(opened))} ]]; do sleep 0.1; done"
    (gate / "scontrol").write_text(f'#!/bin/bash\n{waits}\nexec {shutil.which("scontrol")} "$@"\n')
    (gate / "scontrol").chmod(0o755)
    job = site.submit("preflight.sbatch", "--nodes=1", path=gate)
    wait_for(held.exists, "the template to ask", 60)
    cluster.stop_controller()
    opened.touch()
    try:
        wait_for(lambda: "Unable to contact" in site.output(job), "the client's answer", 120)
    finally:
        cluster.start_controller()
    assert "fit nodes: 1 of 1" in site.finish(job)


def test_nodes_are_not_judged_by_a_check_that_slurm_ended(cluster: Cluster, scratch: Path, data: Path) -> None:
    """Put back while one of its steps has not begun: every step ends without an answer."""
    site = make_site(cluster, scratch / "interrupted_check", data, preflight="yes")
    alerts = note_alerts(site)
    held, _ = hold_a_step_of_the_check(site)
    job = site.submit("pretrain_05b.sbatch", "--nodelist=dgx01,dgx02", "--nodes=2")
    wait_for(held.exists, "a step of the check to begin", 60)
    cluster.command("scontrol", "requeue", str(job))
    output = site.finish(job)
    assert "Slurm has put this job back in the queue" in output
    assert "bad nodes" not in output and "given up" not in output and not alerts.exists(), output


def test_a_chain_counts_the_jobs_that_slurm_has(cluster: Cluster, scratch: Path, data: Path) -> None:
    site = make_site(cluster, scratch / "late", data)
    site.put_before("sbatch", '$real "$@"; exit 1')
    chain = 'source "$1/slurm/site.sh"; PATH=$1/gate:$PATH; export SITE_TIME_LIMIT=1:00:00; "$1/slurm/chain.sh" 2 '
    chain += '--nodes=1 --begin=now+1hour "$1/slurm/pretrain_05b.sbatch"'
    answer = cluster.command("bash", "-c", chain, "x", site.folder)
    jobs = [int(line.split()[-1]) for line in answer.splitlines() if line.startswith("Submitted")]
    assert len(jobs) == 2 and {cluster.job(job)["TimeLimit"] for job in jobs} == {"01:00:00"}, answer
    refuses = 'echo "sbatch: error: Batch job submission failed: Invalid qos specification" >&2; exit 1'
    site.put_before("sbatch", f'[[ -e $0.once ]] && {{ {refuses}; }}\ntouch "$0.once"; exec $real "$@"')
    with pytest.raises(AssertionError, match=r"1 of 2 jobs of chain-\S+ are submitted.*scancel") as refused:
        cluster.command("bash", "-c", chain, "x", site.folder)
    cluster.command("scancel", *map(str, jobs), str(refused.value).split()[-1])
    late = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2'
    site.put_before("sbatch", f'(sleep 3; exec $real "$@" >/dev/null 2>&1) & {late}; exit 1')
    cluster.command("bash", "-c", chain, "x", site.folder)  # or there are fewer than two, and it fails
    with pytest.raises(AssertionError, match=r"exit 2\nSBATCH_TIMELIMIT is set"):
        cluster.command("bash", "-c", chain, "x", site.folder, SBATCH_TIMELIMIT="5")
    names = cluster.command("squeue", "--noheader", "--states=PENDING", "--format=%i %k").splitlines()
    pending = [line.split()[0] for line in names if "chain-" in line]
    assert len(pending) == 2, names
    cluster.command("scancel", *pending)


def test_a_controller_away_during_the_check_makes_no_node_look_bad(cluster: Cluster, scratch: Path) -> None:
    site = Site(cluster, scratch / "failover")
    # Its second step is held until the controller is gone.
    held, opened = hold_a_step_of_the_check(site)
    job = site.submit("preflight.sbatch", "--nodelist=dgx01,dgx02", "--nodes=2")
    wait_for(held.exists, "a step of the check to begin", 60)
    cluster.stop_controller()
    opened.touch()
    try:
        wait_for(lambda: "controller does not answer" in site.output(job), "the launcher to wait for it", 120)
    finally:
        cluster.start_controller()
    output = site.finish(job)
    assert "fit nodes: 2 of 2" in output


def test_a_hopeless_run_is_given_up_with_its_reason(cluster: Cluster, scratch: Path, data: Path) -> None:
    site = make_site(cluster, scratch / "hopeless", data)
    site.edit("SITE_ATTEMPTS=3", "SITE_ATTEMPTS=2")
    site.edit("SITE_SPARE_NODES=0", "SITE_SPARE_NODES=2")
    # The loss overflows in the first steps of every attempt; only the first attempt gets as far as a checkpoint.
    job = site.submit("pretrain_05b.sbatch", "--nodes=2", arguments=("optimizer.learning_rate=1.0e30",))
    output = site.finish(job, expected="FAILED")
    assert output.count("launch: attempt") == output.count("training on 1 nodes") == 3, output
    status = site.status()
    assert status["state"] == "failed"
    assert "2 attempts without a new checkpoint" in status["reason"] and "nan" in status["reason"]
    assert f"Job_id={job}" in (cluster.root / "mail/sent").read_text()


def test_a_job_brought_back_that_cannot_start_is_not_put_back_for_ever(
    cluster: Cluster, scratch: Path, data: Path
) -> None:
    site = make_site(cluster, scratch / "stuck", data)
    site.edit("SITE_ATTEMPTS=3", "SITE_ATTEMPTS=2")
    site.edit("SITE_WRAPPER=(", "SITE_WRAPPER=(${SLURM_RESTART_COUNT:+false} ")
    job = site.submit("pretrain_05b.sbatch", "--nodes=1")
    site.wait_for_step(job, 1)
    cluster.command("scontrol", "requeue", str(job))
    output = site.finish(job, expected="FAILED")
    assert output.count("putting the job back") == 1, output
    assert "not started, for the reason above; submit the template again when it is mended" in output


def test_a_chain_goes_on_after_a_dead_node_and_ends_when_the_run_is_complete(
    cluster: Cluster, scratch: Path, data: Path
) -> None:
    site = make_site(cluster, scratch / "chain", data, steps=400)
    script = 'source "$1/slurm/site.sh"; cd /; "$1/slurm/chain.sh" 4 --nodes=2 "$1/slurm/pretrain_05b.sbatch"'
    jobs = [int(line.split()[-1]) for line in cluster.command("bash", "-c", script, "x", site.folder).splitlines()]
    assert len(jobs) == 4
    other = site.submit("pretrain_05b.sbatch", "--begin=now+1hour", arguments=("run.folder=runs/other",))
    site.wait_for_step(jobs[0], 50)
    site.cluster.command("scancel", str(jobs[0]))
    site.finish(jobs[0], expected="CANCELLED")
    site.finish(jobs[1])
    assert site.status()["state"] == "completed"
    assert [step for step, *_ in site.accepted()] == list(range(1, 401))
    for job in jobs[2:]:
        site.finish(job, timeout=30, expected="CANCELLED")
    assert cluster.job(other)["JobState"] == "PENDING", "a job of the same name that is none of the chain's"
    cluster.command("scancel", str(other))


def test_a_node_that_falls_sick_leaves_nineteen_of_twenty_and_the_sample_order_as_it_was(
    cluster: Cluster, scratch: Path, data: Path
) -> None:
    """Twenty real ranks on twenty nodes, then nineteen: the same rows in the same order, as on one node alone."""
    alone = make_site(cluster, scratch / "alone", data, steps=60)
    # Where its output goes, the disk is full.
    alone.finish(alone.submit("pretrain_05b.sbatch", "--nodes=1", "--output=/dev/full"))
    site = make_site(cluster, scratch / "nineteen", data, steps=60, preflight="yes")
    job = site.submit("pretrain_05b.sbatch", "--signal=B:USR1@60", arguments=("watchdog.hang_minutes=5",))
    site.wait_for_step(job, 20, timeout=400)
    sick = site.cluster.hosts(job)[6]
    cluster.on_node(
        sick, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(site.folder / "runs/mobillama_05b/checkpoints")
    )
    cluster.command("scontrol", "requeue", str(job))
    output = site.finish(job, timeout=600)
    assert "training on 20 nodes" in output and "training on 19 nodes" in output, output
    assert f"{sick}: rank" in output and "Read-only file system" in output, output
    assert (site.run_folder() / "logs/attempt_2/hosts").read_text().split().count(sick) == 0
    for (step, loss, norm), (other_step, other_loss, other_norm) in zip(site.accepted(), alone.accepted(), strict=True):
        assert step == other_step
        assert abs(loss - other_loss) < 1e-5 * other_loss
        assert abs(norm - other_norm) < 1e-4 * other_norm


def test_the_data_array_finishes_on_resubmission_and_does_only_what_is_missing(cluster: Cluster, scratch: Path) -> None:
    site = Site(
        cluster,
        scratch / "array",
        edits={"SITE_RAW_DATA=$SITE_REPOSITORY/data/amber_raw ": f"SITE_RAW_DATA={scratch}/array_raw "},
    )
    raw, built = scratch / "array_raw", site.folder / "data/amber"
    write_raw_rows(raw)
    killed = NUM_SEGMENTS - 1

    def submit() -> int:
        return site.submit("build_amber.sbatch", f"--array=0-{killed}%20", arguments=SHAPE)

    def segments() -> dict[str, tuple[int, bytes]]:
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in built.glob("segment_*.bin")}

    # One task is killed while it runs; then the array has no more to do.
    job = submit()
    wait_for(lambda: cluster.task(job, killed).get("JobState") == "RUNNING", "the last task to run", 60)
    cluster.command("scancel", "--signal=KILL", "--full", f"{job}_{killed}")
    wait_for(lambda: not cluster.command("squeue", "-h", "-j", str(job)).strip(), "the array to end", 60)
    before = segments()
    assert len(before) == killed

    job = submit()
    wait_for(lambda: not cluster.command("squeue", "-h", "-j", str(job)).strip(), "the array to end", 120)
    after = segments()
    assert len(after) == NUM_SEGMENTS
    assert {name: after[name] for name in before} == before, "finished segments are not touched"
    merge = [sys.executable, "data_tools/build_amber.py", "merge", "--input", str(raw), "--output", str(built), *SHAPE]
    cluster.command("bash", "-c", 'cd "$1"; shift; "$@"', "x", site.folder, *merge)
    assert json.loads((built / "manifest.json").read_text())["num_segments"] == NUM_SEGMENTS
