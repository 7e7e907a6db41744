"""NCCL's tree played through, every transfer an event, beside what the plan says of it."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import replace

import pytest

from megatron_patch.parallel.gpus import GIB, GPUS, Network
from megatron_patch.plan.collectives import TREE, Protocol, Span, tree

MIB = 2**20
# No GPU's own PCIe link holds its node's ports back: played through is one channel, which has them all.
DGX = replace(GPUS["a100-80g"].network, gpu_link=GPUS["a100-80g"].network.node)

Gpu = tuple[int, int]  # node, and number on it


def parents(nodes: int, mirrored: bool) -> dict[int, int]:
    """NCCL's binary tree over nodes (src/graph/trees.cc), or its mirror image, whose inner nodes are its leaves."""
    found = {}
    for rank in range(1, nodes):
        bit = rank & -rank
        up = (rank ^ bit) | (bit << 1)
        found[rank] = up if up < nodes else rank ^ bit
    return {nodes - 1 - rank: nodes - 1 - up for rank, up in found.items()} if mirrored else found


def played_through(
    nodes: int, on_node: int, payload: float, network: Network, protocol: Protocol, chunks: int
) -> float:
    """Seconds of an all-reduce over two trees, half of the bytes each, in `chunks` that follow each other.

    A GPU hands a chunk up once it holds it of all below, and down once it has it from above. Transfers of the same time
    share what they leave and enter by: the ports of a node in either direction, a GPU's NVLink.
    """
    edges: list[tuple[int, Gpu, Gpu, bool]] = []  # tree, from, to, upwards
    for t in range(2):
        up: dict[Gpu, Gpu] = {(n, i): (n, i - 1) for n in range(nodes) for i in range(1, on_node)}
        up |= {(n, 0): (above, 0) for n, above in parents(nodes, mirrored=t == 1).items()}
        edges += [(t, below, above, True) for below, above in up.items()]
        edges += [(t, above, below, False) for below, above in up.items()]
    into: dict[tuple[int, Gpu, bool], list[int]] = {}
    for e, (t, _, target, upwards) in enumerate(edges):
        into.setdefault((t, target, upwards), []).append(e)
    crosses = [source[0] != target[0] for _, source, target, _ in edges]
    sent, got = [0] * len(edges), [0] * len(edges)
    left: dict[int, float] = {}  # bytes of the chunk that is under way
    arrivals: list[tuple[float, int]] = []
    now, size = 0.0, payload / 2 / chunks

    def held(e: int) -> int:
        """Chunks that the edge's source may hand on."""
        t, source, _, upwards = edges[e]
        if not upwards and (from_above := into.get((t, source, False))):
            return got[from_above[0]]
        return min((got[below] for below in into.get((t, source, True), ())), default=chunks)

    while True:
        left |= {e: size for e in range(len(edges)) if e not in left and sent[e] < held(e)}
        if not left and not arrivals:
            return now
        ways = Counter(
            way
            for e in left
            for way in ([("out", edges[e][1][0]), ("in", edges[e][2][0])] if crosses[e] else [("NVLink", edges[e][1])])
        )
        rate = {
            e: network.node / max(ways["out", edges[e][1][0]], ways["in", edges[e][2][0]])
            if crosses[e]
            else network.nvlink / ways["NVLink", edges[e][1]]
            for e in left
        }
        then = min([now + bytes_left / rate[e] for e, bytes_left in left.items()] + [t for t, _ in arrivals[:1]])
        for e in list(left):
            left[e] -= rate[e] * (then - now)
            if left[e] <= size * 1e-9:
                del left[e]
                sent[e] += 1
                heapq.heappush(arrivals, (then + (protocol.hop if crosses[e] else protocol.step), e))
        now = then
        while arrivals and arrivals[0][0] <= now + 1e-15:
            got[heapq.heappop(arrivals)[1]] += 1


@pytest.mark.parametrize(
    ("nodes", "on_node", "payload", "chunks"),
    [
        (8, 8, 8, 1),  # all latency
        (16, 8, 8, 1),
        (32, 4, 64, 1),
        (6, 1, GIB, 128),  # all bandwidth
        (8, 2, GIB, 128),
    ],
)
@pytest.mark.parametrize("kind", ["Simple", "LL"])
def test_a_tree_played_through(kind: str, nodes: int, on_node: int, payload: int, chunks: int) -> None:
    planned, played = both_ways(kind, nodes, on_node, payload, chunks)
    assert planned == pytest.approx(played, rel=0.05)


def test_between_latency_and_bandwidth_the_plan_is_no_shorter() -> None:
    """It adds the two, as NCCL's own estimate does; bytes move while others are on their way."""
    planned, played = both_ways("Simple", 8, 1, 64 * MIB, 128)
    assert played < planned < 1.15 * played


def both_ways(kind: str, nodes: int, on_node: int, payload: int, chunks: int) -> tuple[float, float]:
    """Seconds as planned, and as played through."""
    protocol = replace(TREE[kind], base=0.0)
    where = Span(nodes * on_node, nodes, on_node, rivals=1)
    slowed = replace(DGX, node=DGX.node * protocol.share, nvlink=DGX.nvlink * protocol.share)
    return tree(payload, where, DGX, protocol), played_through(nodes, on_node, payload, slowed, protocol, chunks)
