"""Which nodes are fit: the verdict on what preflight.py measured.

The judge runs in one place, a thread of the first rank, and talks to the ranks through files of one shared folder F:

    F/hosts               the launcher: the host of each rank, one a line
    F/node.RANK.json      every rank: what it measured on its own, or {"error": ...}
    F/round0.plan.json    the judge, when all have answered or the deadline is over: groups of ranks to all-reduce
    F/round0.RANK.json    every rank of a group: its bandwidth or error; likewise round1, round2, then "all"
    F/bad, F/good         the verdict for shell scripts: `HOST: reason` and `HOST` lines
    F/measured.json       what the fit nodes reach, for `plan --measured F`
    F/verdict.json        the verdict again; written last
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch import launch

ROUNDS = 3  # partners that a node meets
RATES = ("gemm", "copy", "disk", "disk_read")
PHASES = (*(f"round{i}" for i in range(ROUNDS)), "all")

Answers = Mapping[int, Mapping[str, Any]]  # by rank
Pair = tuple[str, str]  # hosts


@dataclass(frozen=True)
class Limits:
    """Shares of the median pace below which a node is bad, and the seconds that one measurement may take."""

    slow: float
    slow_network: float
    slow_disk: float
    patience: float


def judge(folder: Path, hosts: Sequence[str], limits: Limits) -> None:
    """Lead the ranks through all phases and write the verdict. `hosts` names the host of each rank."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    # Ranks may start a while after one another; later phases start together.
    answers = _collect(folder, "node", range(len(hosts)), 2 * limits.patience)
    bad = unfit_nodes(hosts, answers, limits)
    paces: dict[Pair, float | None] = {}
    rounds = pairings([host for host in ranks if host not in bad])
    for number in range(ROUNDS):
        pairs = rounds[number] if number < len(rounds) else []
        groups = [ranks[a] + ranks[b] for a, b in pairs]
        paces |= zip(pairs, _all_reduce(folder, f"round{number}", groups, limits.patience), strict=True)
    bad |= unfit_pairs(paces, limits.slow_network)
    good = [host for host in ranks if host not in bad]
    everyone = [rank for host in good for rank in ranks[host]]
    if None in _all_reduce(folder, "all", [everyone] if everyone else [], limits.patience):
        bad |= dict.fromkeys(good, "all fit nodes fail together, though every pair of them works")
        good = []
    (folder / "bad").write_text("".join(f"{host}: {why}\n" for host, why in sorted(bad.items())))
    (folder / "good").write_text("".join(f"{host}\n" for host in good))
    everyone = [rank for host in good for rank in ranks[host]]
    launch.write_json(folder / "measured.json", measured(answers, _collect(folder, "all", everyone, 0), hosts))
    launch.write_json(folder / "verdict.json", {"good": good, "bad": bad})


def measured(nodes: Answers, together: Answers, hosts: Sequence[str]) -> dict[str, Any]:
    """What the slowest of the fit ranks reaches, which all others wait for; `together`: their common all-reduce.

    Keys: device, ranks, nodes; gemm in FLOP/s, copy in bytes/s; disk (written) and disk_read in bytes/s of a node while
    all nodes do the same; all_reduce, seconds by bytes.
    """
    fit = [nodes[rank] for rank in together]
    sizes: Sequence[int] = next(([*answer["seconds"]] for answer in together.values() if "seconds" in answer), [])
    return {
        "device": fit[0]["device"] if fit else None,
        "ranks": len(fit),
        "nodes": len({hosts[rank] for rank in together}),
        **{what: min((a[what] for a in fit if what in a), default=None) for what in RATES},
        "all_reduce": {size: max(a["seconds"][size] for a in together.values() if "seconds" in a) for size in sizes},
    }


def unfit_nodes(hosts: Sequence[str], answers: Answers, limits: Limits) -> dict[str, str]:
    """Hosts with a rank that is silent, reports an error, has another device than most, or lags behind the median."""
    bad: dict[str, str] = {}
    usual = statistics.mode(a["device"] for a in answers.values() if "device" in a) if answers else None
    shares = {"gemm": limits.slow, "copy": limits.slow, "disk": limits.slow_disk}
    medians = {what: _median(answer.get(what) for answer in answers.values()) for what in shares}
    for rank, host in enumerate(hosts):
        answer = answers.get(rank)
        if answer is None:
            why = f"rank {rank} never answered"
        elif "error" in answer:
            why = f"rank {rank}: {answer['error']}"
        elif answer["device"] != usual:
            why = f"rank {rank}: device {answer['device']} where most have {usual}"
        elif slow := [w for w, share in shares.items() if w in answer and answer[w] < share * medians[w]]:
            why = f"rank {rank}: " + ", ".join(f"{w} at {answer[w] / medians[w]:.0%} of the median pace" for w in slow)
        else:
            continue
        bad.setdefault(host, why)
    return bad


def pairings(hosts: Sequence[str]) -> list[list[Pair]]:
    """Disjoint pairs for each of ROUNDS rounds, nobody paired twice with the same host (circle method).

    Fewer hosts have fewer partners: n hosts have at most n - 1 rounds (n where n is odd; one host then rests).
    """
    circle: list[str | None] = [*hosts, *([None] if len(hosts) % 2 else [])]
    rounds = []
    for _ in range(min(ROUNDS, max(len(circle) - 1, 0))):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(a, b) for a, b in facing if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def unfit_pairs(paces: Mapping[Pair, float | None], slow: float) -> dict[str, str]:
    """Hosts to blame for pairs that fail (None) or lag behind the median pace of all pairs.

    A host is to blame when every pair of it is bad; where that leaves a bad pair unexplained, both its hosts are.
    """
    median = _median(paces.values())
    faults = {
        pair: "fails" if pace is None else f"runs at {pace / median:.0%} of the median pace"
        for pair, pace in paces.items()
        if pace is None or pace < slow * median
    }
    hosts = {host for pair in paces for host in pair}
    blamed = {host for host in hosts if all(pair in faults for pair in paces if host in pair)}
    # A partner of a culprit who met nobody else would be blamed with it: it is, since nothing speaks for it.
    blamed |= {host for pair in faults if not blamed & set(pair) for host in pair}
    return {
        host: "; ".join(
            f"all-reduce with {_other(pair, host)} {fault}" for pair, fault in faults.items() if host in pair
        )
        for host in blamed
    }


def _other(pair: Pair, host: str) -> str:
    return pair[1] if pair[0] == host else pair[0]


def _median(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else 0.0


def _all_reduce(folder: Path, phase: str, groups: Sequence[Sequence[int]], patience: float) -> list[float | None]:
    """Let groups of ranks all-reduce at the same time; the slowest rank's bandwidth of each, None where one failed."""
    launch.write_json(folder / f"{phase}.plan.json", {"groups": groups})
    answers = _collect(folder, phase, [rank for group in groups for rank in group], patience + 10)
    return [
        None
        if any("all_reduce" not in answers.get(rank, {}) for rank in group)
        else min(answers[rank]["all_reduce"] for rank in group)
        for group in groups
    ]


def _collect(folder: Path, phase: str, ranks: Iterable[int], patience: float) -> dict[int, dict[str, Any]]:
    """The answers of a phase, as many as come in time."""
    files = {rank: folder / f"{phase}.{rank}.json" for rank in ranks}
    end = time.monotonic() + patience
    while time.monotonic() < end and not all(file.exists() for file in files.values()):
        time.sleep(0.2)
    return {rank: answer for rank, file in files.items() if (answer := launch.read_json(file))}
