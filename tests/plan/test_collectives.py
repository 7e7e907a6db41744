"""The model of collectives against published nccl-tests figures, and against rings played through hop by hop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_patch.parallel.gpus import GPUS, Network
from megatron_patch.plan.collectives import RING, Span, ring, seconds, span

MIB, GIB = 2**20, 2**30
A100, H100 = GPUS["a100-80g"].network, GPUS["h100"].network

# (what, network, nodes, bytes, bus bandwidth in GB/s), each an all-reduce over whole nodes of 8. No second table of DGX
# A100 was found (docs/log.md); all pages are below https://github.com/.
PUBLISHED = [
    ("NVIDIA/nccl/issues/527: one p4d.24xlarge, 8 A100", A100, 1, GIB, 230.8),
    ("NVIDIA/nccl #1048: one node of 8 A100", A100, 1, 4 * GIB, 232.5),
    ("NVIDIA/nccl #812: DGX A100, 8 ports of 200 Gb/s", A100, 2, 8 * GIB, 192),
    ("NVIDIA/nccl-tests #100: 2 HGX A100, 4 ports of 200 Gb/s", A100.with_ports(4, 200), 2, 8 * GIB, 91),
    ("NVIDIA/nccl #1048: 2 nodes, 4 ports of 200 Gb/s", A100.with_ports(4, 200), 2, 4 * GIB, 86),
    ("NVIDIA/nccl-tests #119: 3 nodes of 8 A100, 4 ports of 200 Gb/s", A100.with_ports(4, 200), 3, 128 * MIB, 96),
    ("NVIDIA/nccl #412: 12 nodes of 8 A800, 1 port of 200 Gb/s", A100.with_ports(1, 200), 12, 8 * GIB, 24),
    ("NVIDIA/nccl-tests #212: one node of 8 H100, NCCL_ALGO=RING", H100, 1, 8 * GIB, 370),
    ("NVIDIA/nccl-tests #309: 4 nodes of 8 H100, 8 ports of 400 Gb/s", H100, 4, 16 * GIB, 365.8),
]
# NVIDIA/nccl-tests/issues/252: two nodes of 4 H100 with 4 ports, NCCL_ALGO=RING, "~24GB/s per NIC": (bytes, GB/s).
FOUR_A_NODE = [(GIB // 2, 93.5), (GIB, 93.6), (2 * GIB, 94.3), (4 * GIB, 97.4), (8 * GIB, 95.1)]
# lessizzmore/create-a3mega-ztan-fork/blob/main/ztan-NCCL-test-result: two nodes of 8 H100 with 8 ports of 200 Gb/s (A3
# Mega), whose bus bandwidth of more than the ports' is a tree's. Smaller sizes show its network's latency (123 us for 8
# bytes), which is not InfiniBand's.
TWO_NODES = [(2 * GIB, 318.4), (4 * GIB, 330.6), (8 * GIB, 338.8)]
# (what, network, nodes, microseconds) of an all-reduce of 8 bytes, which NCCL runs as a tree.
PUBLISHED_LATENCY = [
    ("NVIDIA/nccl #652: 32 nodes of 8 A100", A100.with_ports(4, 200), 32, 63),
    ("NVIDIA/nccl #1469: 16 nodes of 8 H100", H100, 16, 62),
]


def bus_bandwidth(network: Network, nodes: int, size: int) -> float:
    """GB/s as nccl-tests reports it."""
    ranks = 8 * nodes
    whole = seconds("all-reduce", size, span("world", 1, ranks, 1, 8), network, only_rings=True)
    return 2 * (ranks - 1) / ranks * size / whole / 1e9


@pytest.mark.parametrize(("what", "network", "nodes", "size", "published"), PUBLISHED)
def test_published_bandwidths(what: str, network: Network, nodes: int, size: int, published: float) -> None:
    assert bus_bandwidth(network, nodes, size) == pytest.approx(published, rel=0.15), what


@pytest.mark.parametrize(("size", "published"), FOUR_A_NODE)
def test_published_nodes_of_four(size: int, published: float) -> None:
    seconds_taken = seconds("all-reduce", size, span("world", 1, 8, 1, 4), H100.with_ports(4, 200), only_rings=True)
    assert 2 * 7 / 8 * size / seconds_taken / 1e9 == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(("size", "published"), TWO_NODES)
def test_published_tree_over_two_nodes(size: int, published: float) -> None:
    network, where = H100.with_ports(8, 200), span("world", 1, 16, 1, 8)
    chosen, rings = (seconds("all-reduce", size, where, network, only_rings=only) for only in (False, True))
    assert 2 * 15 / 16 * size / chosen / 1e9 == pytest.approx(published, rel=0.15)
    assert rings > 1.5 * chosen


@pytest.mark.parametrize("nodes", [2, 4, 8, 16, 32, 64])
def test_a_dgx_keeps_its_bandwidth_over_many_nodes(nodes: int) -> None:
    """What NVIDIA measures on DGX A100 (NVIDIA/nccl #812) is not divided by the GPUs of a node, nor by the nodes."""
    assert bus_bandwidth(A100, nodes, 8 * GIB) == pytest.approx(192, rel=0.05)


@pytest.mark.parametrize(("what", "network", "nodes", "published"), PUBLISHED_LATENCY)
def test_published_latencies(what: str, network: Network, nodes: int, published: float) -> None:
    found = seconds("all-reduce", 8, span("world", 1, 8 * nodes, 1, 8), network, only_rings=False)
    assert found * 1e6 == pytest.approx(published, rel=0.15), what


def played_through(groups: list[list[int]], per_node: int, payload: float, network: Network, rounds: int = 1) -> float:
    """Seconds in which rings over `groups` of ranks, all at once, pass their chunks on; every transfer an event.

    A group opens a ring for each of its members on a node, so that each leaves the node by another GPU. A GPU passes a
    chunk on when it holds it and its last one is out. Transfers share what they leave by: a GPU's NVLink, its PCIe
    link, the ports of its node. Simple protocol, without its cost once a collective.
    """
    protocol = RING["Simple"]
    rings: list[tuple[list[int], float]] = []  # ranks in their order, bytes of a chunk
    for group in groups:
        nodes = [[r for r in group if r // per_node == n] for n in sorted({r // per_node for r in group})]
        orders = [[r for node in nodes for r in node[c:] + node[:c]] for c in range(min(len(node) for node in nodes))]
        rings += [(order, payload / len(group) / len(orders)) for order in orders]
    links = [  # (GPU, node or -1 for NVLink, bytes of a chunk, hops)
        (own, own // per_node if own // per_node != order[(i + 1) % len(order)] // per_node else -1, chunk, len(order))
        for order, chunk in rings
        for i, own in enumerate(order)
    ]
    right = np.arange(len(links)) + 1
    right[np.cumsum([len(order) for order, _ in rings]) - 1] -= [len(order) for order, _ in rings]
    gpu, node, chunk = (np.array([link[k] for link in links]) for k in range(3))
    left_to_send = np.array([rounds * (link[3] - 1) for link in links])
    outside = node >= 0
    held = np.ones(len(links), int)  # chunks that a GPU may pass on
    begins = np.full(len(links), protocol.step)  # when the bytes of what it passes on start to move; inf: idle
    left = chunk.astype(float)  # bytes
    arrivals: list[tuple[float, int]] = []
    now, busy = 0.0, np.ones(len(links), bool)
    while busy.any() or arrivals:
        moving = busy & (begins <= now + 1e-12)
        inside, out = moving & ~outside, moving & outside
        rate = np.zeros(len(links))
        rate[inside] = network.nvlink / np.bincount(gpu[inside])[gpu[inside]]
        rate[out] = np.minimum(
            network.gpu_link / np.bincount(gpu[out])[gpu[out]], network.node / np.bincount(node[out])[node[out]]
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.where(moving, now + left / rate, np.inf)
        waiting = begins[busy & ~moving]
        then = min([ends.min(), *([waiting.min()] if len(waiting) else []), *(t for t, _ in arrivals[:1])])
        left[moving] -= rate[moving] * (then - now)
        now = then
        done = np.flatnonzero(moving & (ends <= now + 1e-12))
        for i in done:
            busy[i], left_to_send[i] = False, left_to_send[i] - 1
            arrivals.append((now + (protocol.hop - protocol.step) * bool(outside[i]), int(right[i])))
        arrivals.sort()
        while arrivals and arrivals[0][0] <= now + 1e-12:
            held[arrivals.pop(0)[1]] += 1
        held[done] -= 1
        start = np.flatnonzero(~busy & (held > 0) & (left_to_send > 0))
        busy[start], left[start], begins[start] = True, chunk[start], now + protocol.step
    return now


def data_groups(tensor: int, data: int, pipeline: int) -> list[list[int]]:
    """Ranks of each data-parallel group, counted one by one: tensor ranks are neighbours, then data, then pipeline."""
    groups: dict[tuple[int, int], list[int]] = {}
    for rank in range(tensor * data * pipeline):
        groups.setdefault((rank % tensor, rank // (tensor * data)), []).append(rank)
    return list(groups.values())


@pytest.mark.parametrize("size", [MIB, 64 * MIB, GIB])
@pytest.mark.parametrize(
    ("layout", "network"),
    [
        ((1, 8, 1), A100),  # inside a node
        ((1, 32, 1), A100),
        ((1, 32, 1), A100.with_ports(2, 200)),
        ((2, 12, 1), A100.with_ports(2, 200)),  # two rings of four GPUs a node
        ((8, 4, 1), A100.with_ports(2, 200)),  # eight rings of one GPU a node share the ports
        ((1, 8, 3), A100),  # a stage a node: no ring leaves one
        ((1, 12, 2), H100),  # a node holds the ends of two stages
    ],
)
def test_rings_played_through(layout: tuple[int, int, int], network: Network, size: int) -> None:
    where = span("data", *layout, 8)
    found = ring("reduce-scatter", size, where, network, replace(RING["Simple"], base=0.0))
    assert found == pytest.approx(played_through(data_groups(*layout), 8, size, network), rel=0.05)


def test_how_groups_lie_over_nodes() -> None:
    assert span("data", 1, 160, 1, 8) == Span(size=160, nodes=20, on_node=8, rivals=1)
    assert span("data", 2, 80, 1, 8) == Span(size=80, nodes=20, on_node=4, rivals=2)
    assert span("data", 8, 20, 1, 8) == Span(size=20, nodes=20, on_node=1, rivals=8)
    assert span("tensor", 8, 20, 1, 8) == Span(size=8, nodes=1, on_node=8, rivals=0)
    assert span("pipeline", 1, 80, 2, 8) == Span(size=2, nodes=2, on_node=1, rivals=8)
    assert span("data", 1, 12, 2, 8) == Span(size=12, nodes=2, on_node=4, rivals=2)
    with pytest.raises(ValueError, match=r"no more than 1048576 can be planned"):
        span("data", 1, 10**9, 1, 8)
