"""A real multi-node Slurm on one machine: distribution packages, one set of namespaces a node, no systemd.

Every node is a `slurmd` with its own process, mount, host-name and network namespace, an address of its own on a
bridge, and eight character devices that stand for GPUs. Killing a node's first process is a power cut. The tests run
inside an outer namespace (`tests/cluster/run`), so that the machine's own network, processes and mounts are untouched.
"""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

CONTROLLER = "10.77.0.1"
T = TypeVar("T")

# cred_expire is also the delay before a requeued job may start again (120 s by default).
# JobRequeue=0: what a template needs, it asks for.
# config_overrides lets a node claim more processors and memory than the machine has.
SLURM_CONF = """\
ClusterName=tests
SlurmctldHost=localhost({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire={requeue_delay}
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg={root}/etc/mail
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=1
SlurmdTimeout=5
MessageTimeout=20
KillWait=20
MinJobAge=3600
JobRequeue=0
TopologyPlugin=topology/tree
NodeName={nodes} NodeAddr=10.77.0.[{first}-{last}] CPUs=128 Sockets=2 CoresPerSocket=64 ThreadsPerCore=1 \
RealMemory=1000000 Gres=gpu:a100:{gpus} State=UNKNOWN
{partitions}
"""
DEFAULT_PARTITION = "PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP"


def wait_for(condition: Callable[[], T], what: str, timeout: float, step: float = 0.1) -> T:
    """Poll until `condition` answers something true and return it; fail after `timeout` seconds naming `what`."""
    end = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(step)
    return answer


class Cluster:
    """Slurm daemons and nodes under one folder; a context manager that leaves no process behind."""

    def __init__(
        self,
        root: Path,
        nodes: int = 20,
        gpus: int = 8,
        partitions: Sequence[str] = (DEFAULT_PARTITION,),
        extra: Sequence[str] = (),
        requeue_delay: int = 5,
    ) -> None:
        self.root = root
        self.names = [f"dgx{i:02d}" for i in range(1, nodes + 1)]
        self.address = {name: f"10.77.0.{100 + i}" for i, name in enumerate(self.names, 1)}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment["SLURM_CONF"] = str(root / "etc/slurm.conf")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._write(gpus, "\n".join([*partitions, *extra]), requeue_delay)

    def _write(self, gpus: int, partitions: str, requeue_delay: int) -> None:
        root, count = self.root, len(self.names)
        for folder in ("etc", "log", "state", "munge", "gres", "mail"):
            (root / folder).mkdir(parents=True)
        for name in self.names:
            (root / "spool" / name).mkdir(parents=True)
        (root / "munge").chmod(0o711)
        key = root / "munge/munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for i in range(gpus):
            os.mknod(root / f"gres/nvidia{i}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # slurmd wants a device
        etc = root / "etc"
        mail = etc / "mail"
        mail.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{root}/mail/sent\n')  # slurmctld passes -s SUBJECT ADDRESS
        mail.chmod(0o755)
        (etc / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost", *(f"{a} {n}" for n, a in self.address.items())]) + "\n"
        )
        nodes = f"dgx[01-{count:02d}]"
        (etc / "slurm.conf").write_text(
            SLURM_CONF.format(
                controller=CONTROLLER,
                root=root,
                requeue_delay=requeue_delay,
                nodes=nodes,
                first=101,
                last=100 + count,
                gpus=gpus,
                partitions=partitions,
            )
        )
        (etc / "gres.conf").write_text(f"NodeName={nodes} Name=gpu Type=a100 File={root}/gres/nvidia[0-{gpus - 1}]\n")
        # Two leaf switches, odd and even nodes, so that the order by name is not the order by switch.
        (etc / "topology.conf").write_text(
            f"SwitchName=odd Nodes={','.join(self.names[0::2])}\n"
            f"SwitchName=even Nodes={','.join(self.names[1::2])}\n"
            "SwitchName=spine Switches=odd,even\n"
        )

    def __enter__(self) -> Cluster:
        subprocess.run(["mount", "--bind", self.root / "etc/hosts", "/etc/hosts"], check=True)
        for arguments in (
            "link set lo up",
            "link add br0 type bridge",
            f"addr add {CONTROLLER}/24 dev br0",
            "link set br0 up",
        ):
            self._ip(arguments)
        munge = self.root / "munge"
        self._spawn(
            "munged",
            "munged --foreground --num-threads=4",
            *(f"--{option}={munge}/munged.{option}" for option in ("pid-file", "log-file", "seed-file")),
            f"--key-file={munge}/munge.key",
            f"--socket={munge}/munge.sock",
        )
        wait_for((munge / "munge.sock").exists, "munged's socket", 10)
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        wait_for(lambda: self.node_states() == {"idle": len(self.names)}, "all nodes idle", 60)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in self.names:
            self._ip(f"link del {self.cable(name)}")
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._ip("link del br0")
        subprocess.run(["umount", "/etc/hosts"], check=True)

    def _ip(self, arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True)

    def _spawn(
        self, name: str, command: str, *arguments: str, stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        with (self.root / f"log/{name}.out").open("ab") as log:
            process = subprocess.Popen(
                [*command.split(), *arguments], env=self.environment, stdin=stdin, stdout=log, stderr=log
            )
        self._processes[name] = process
        return process

    def start_controller(self) -> None:
        self._spawn("slurmctld", "slurmctld -D")

    def kill_controller(self) -> None:
        self._processes["slurmctld"].kill()
        self._processes["slurmctld"].wait()

    def stop_controller(self) -> None:
        """It saves its state, which a controller that is killed does some seconds after a change."""
        self._processes["slurmctld"].terminate()
        self._processes["slurmctld"].wait()

    def start_node(self, name: str) -> None:
        """Boot a node: its namespaces, its cable to the bridge, its slurmd."""
        # bash is the node's first process: it reaps what slurmd leaves. It waits until the cable is in.
        boot = (
            f"hostname {name}; read -r; ip link set lo up; ip link set eth0 up; "
            f"ip addr add {self.address[name]}/24 dev eth0; slurmd -D -N {name} & wait $!"
        )
        node = self._spawn(
            name,
            "unshare --pid --fork --kill-child --mount --mount-proc --uts --net bash -c",
            boot,
            stdin=subprocess.PIPE,
        )
        first = wait_for(lambda: self._first_process(node), f"{name} to boot", 10, step=0.005)
        cable = self.cable(name)
        self._ip(f"link add {cable} type veth peer name eth0 netns {first}")
        self._ip(f"link set {cable} master br0 up")
        assert node.stdin is not None
        node.stdin.write(b"\n")
        node.stdin.close()

    @staticmethod
    def _first_process(node: subprocess.Popen[bytes]) -> int:
        """The bash inside the node's namespaces: the only child of unshare(1); 0 until it is there."""
        children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def cut_power(self, name: str) -> None:
        """Everything on the node ends at once."""
        self._ip(f"link del {self.cable(name)}")  # the kernel would take it away too, but at a time of its own
        node = self._processes[name]
        node.kill()
        node.wait()

    def cable(self, name: str) -> str:
        """The bridge's end of a node's network link."""
        return f"veth{self.names.index(name) + 1}"

    def on_node(self, name: str, *command: str) -> str:
        """Run a command inside a node's namespaces, as a login there would."""
        inside = ["nsenter", f"--target={self._first_process(self._processes[name])}", "--all"]
        return subprocess.run(
            [*inside, *command], env=self.environment, check=True, capture_output=True, text=True
        ).stdout

    def command(self, *arguments: str | Path, check: bool = True, **environment: str) -> str:
        """Run a client command (sbatch, scontrol, ...) and return its output; fails with its error message."""
        done = subprocess.run(
            [str(a) for a in arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def node_states(self) -> dict[str, int]:
        states: dict[str, int] = {}
        for line in self.command("sinfo", "-h", "-p", "train", "-o", "%D %T", check=False).splitlines():
            if line[:1].isdigit():
                count, state = line.split()
                states[state] = states.get(state, 0) + int(count)
        return states

    def job(self, number: int) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.command("scontrol", "show", "job", "-o", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def task(self, array: int, index: int) -> dict[str, str]:
        """Fields of one task of an array job; empty while it is not split off from the array."""
        for line in self.command("scontrol", "show", "job", "-o", str(array)).splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if fields.get("ArrayTaskId") == str(index):
                return fields
        return {}

    def hosts(self, number: int) -> list[str]:
        """Nodes of a running job, in Slurm's order."""
        return self.command("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def signal_rank(self, name: str, signal: str) -> None:
        """Send a signal to every training process on a node."""
        self.on_node(name, "pkill", f"-{signal}", "-f", "megatron_patch train")

    def a_rank_runs(self) -> bool:
        """Whether Python has begun on any node to train; nodes have their processes in common."""
        found = subprocess.run(["pgrep", "-f", "^python -m megatron_patch train"], stdout=subprocess.DEVNULL)
        return found.returncode == 0

    def rank_environment(self, name: str) -> dict[str, str]:
        """Variables of a training process on a node."""
        script = "cat /proc/$(pgrep -f 'megatron_patch [t]rain' | head -n 1)/environ"
        entries = self.on_node(name, "bash", "-c", script).split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)

    def wait_job(self, number: int, state: str, timeout: float) -> dict[str, str]:
        return wait_for(
            lambda: (job := self.job(number))["JobState"] == state and job, f"job {number} to be {state}", timeout
        )
