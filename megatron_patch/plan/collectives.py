"""Seconds that a collective takes: which of its hops stay in a node, and NCCL's own choice of ring or tree.

A process group is laid over nodes by the rank map (parallel/topology.py: tensor ranks are neighbours, then data, then
pipeline). A ring runs through all members of a node before it leaves it, so all but one of a node's hops are NVLink;
NCCL opens as many rings as it needs channels, one through each port, so a group that has a whole node has all its
ports, and groups that leave a node at the same time share them.

What a hop costs beside its bytes is NCCL's own table (src/graph/tuning.cc), microseconds by protocol; so are the shares
of the bandwidth. Rings have 2.10's, trees 2.19's: before, a hop of a tree under Simple held the transfer of a chunk of
256 KB, which is counted here by itself. NCCL estimates each algorithm and protocol and takes the fastest, and so does
`seconds`. Not counted: NVLink SHARP (all-reduces inside an H100 node get 480 instead of 370 GB/s).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from megatron_patch.parallel.gpus import Network

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "send"]
Kind = Literal["data", "tensor", "pipeline", "world"]
MOST_RANKS = 2**20  # of a rank map that is looked at rank by rank


@dataclass(frozen=True)
class Protocol:
    """A way in which NCCL moves a chunk. Seconds; `share` is of the bus bandwidth."""

    base: float  # once a collective
    step: float  # of a hop inside a node: the two GPUs are busy with it
    hop: float  # of a hop between nodes: beyond `step` the bytes are on their way, and nobody is busy
    share: float

    def slowed(self, factor: float) -> Protocol:
        return Protocol(self.base * factor, self.step * factor, self.hop * factor, self.share)


_US = 1e-6
RING = {
    "LL": Protocol(3.6 * _US, 0.47 * 1.8 * _US, 2.7 * _US, 1 / 4),
    "LL128": Protocol(10.0 * _US, 1.9 * _US, 4.0 * _US, 0.92),
    "Simple": Protocol(8.4 * _US, 3.4 * _US, 9.6 * _US, 1.0),
}
TREE = {
    "LL": Protocol(6.8 * _US, 0.6 * 1.8 * _US, 5.0 * _US, 0.9 / 3.8),
    "LL128": Protocol(14.0 * _US, 1.25 * _US, 8.5 * _US, 0.92 * 0.915),
    "Simple": Protocol(8.4 * _US, 4.0 * _US, 14.0 * _US, 0.92),
}
_LARGEST_CHUNK = 2**19
_SMALLER_CHUNKS = ((8, 2**17), (4, 2**16), (1, 2**15))
"""While fewer than so many chunks for each hop follow one another, they are halved down to so many bytes."""


@dataclass(frozen=True)
class Span:
    """How a process group lies over nodes."""

    size: int  # ranks
    nodes: int
    on_node: int  # ranks on the node that has fewest of them
    rivals: int  # groups, this one too, that leave the busiest of its nodes at the same time

    def ports(self, network: Network) -> float:
        """Bytes/s through which the group leaves a node, where it has several."""
        return min(network.node / self.rivals, self.on_node * network.gpu_link)

    def bus(self, network: Network) -> float:
        """Bytes/s of the slowest hop of the group's rings."""
        if self.nodes == 1:
            return network.nvlink
        outside = self.ports(network)
        return min(outside, network.nvlink) if self.size > self.nodes else outside


@lru_cache(maxsize=64)
def span(kind: Kind, tensor: int, data: int, pipeline: int, per_node: int) -> Span:
    """The span of that kind's groups, of the slowest one where they differ.

    Raises ValueError where there are too many ranks to look at.
    """
    if (world := tensor * data * pipeline) > MOST_RANKS:
        raise ValueError(f"{world} GPUs: no more than {MOST_RANKS} can be planned; use fewer nodes")
    ranks = np.arange(world)
    group = {
        "data": ranks % tensor + ranks // (tensor * data) * tensor,
        "tensor": ranks // tensor,
        "pipeline": ranks % (tensor * data),
        "world": np.zeros(world, int),
    }[kind]
    num_nodes = -(-world // per_node)
    places, members = np.unique(group * num_nodes + ranks // per_node, return_counts=True)
    of_group, of_node = places // num_nodes, places % num_nodes
    first = np.flatnonzero(np.diff(of_group, prepend=-1))  # of each group's entries, one a node
    nodes = np.diff(first, append=len(places))
    leaves = np.repeat(nodes > 1, nodes)
    rivals = np.bincount(of_node[leaves], minlength=num_nodes)[of_node]
    size = {"data": data, "tensor": tensor, "pipeline": pipeline, "world": world}[kind]
    shapes = np.stack([nodes, np.minimum.reduceat(members, first), np.maximum.reduceat(rivals, first)], axis=1)
    found = [Span(size, *map(int, shape)) for shape in np.unique(shapes, axis=0)]
    return max(found, key=lambda s: (s.nodes > 1, s.rivals / s.on_node, s.nodes))


def seconds(
    operation: Operation, payload: float, where: Span, network: Network, only_rings: bool, calls: int = 1
) -> float:
    """Time of `calls` collectives one after the other, `payload` bytes of the whole tensors in all.

    `only_rings`: deterministic runs set NCCL_ALGO=Ring. Trees exist for all-reduces alone.
    """
    if where.size == 1 or not calls:
        return 0.0
    each = payload / calls
    rings = [protocol.slowed(network.latency) for protocol in RING.values()]
    if operation == "send":
        hop = [protocol.base + (protocol.hop if where.nodes > 1 else protocol.step) for protocol in rings]
        return calls * hop[-1] + payload / where.bus(network)
    times = [ring(operation, each, where, network, protocol) for protocol in rings]
    if operation == "all-reduce" and not only_rings:
        times += [tree(each, where, network, protocol.slowed(network.latency)) for protocol in TREE.values()]
    return calls * min(times)


def ring(operation: Operation, payload: float, where: Span, network: Network, protocol: Protocol) -> float:
    """A chunk of payload / size goes once around (an all-reduce: twice), while its neighbours do.

    The time is that of the busiest pair of GPUs, which passes all chunks but one, or that of a chunk's way, whichever
    is longer.
    """
    rounds = 2 if operation == "all-reduce" else 1
    steps = rounds * (where.size - 1)
    between = min(rounds * where.nodes, steps) if where.nodes > 1 else 0  # a way that leaves out a hop inside a node
    chunk = payload / where.size / protocol.share
    bus = where.bus(network)
    busiest = steps * (protocol.step + chunk / bus) + (protocol.hop - protocol.step if between else 0.0)
    inside = steps - between
    way = inside * (protocol.step + chunk / network.nvlink) + between * (protocol.hop + chunk / bus)
    return protocol.base + max(busiest, way)


def tree_chunks(payload: float, where: Span, network: Network) -> int:
    """Chunks in which a tree's bytes follow one another, as NCCL chooses them (src/enqueue.cc, Simple)."""
    channels = max(2, round(2 * network.node / network.gpu_link))  # two a port, half of them for either tree
    hops = -(-where.size // where.nodes) - 1 + int(math.log2(where.nodes))
    size = _LARGEST_CHUNK
    for least, smallest in _SMALLER_CHUNKS:
        while payload / channels / size < least * hops and size > smallest:
            size //= 2
    return max(1, math.ceil(payload / channels / size))


def tree(payload: float, where: Span, network: Network, protocol: Protocol) -> float:
    """Two binary trees over nodes with half of the bytes each, and a chain inside each node: up it, and down again.

    What is an inner node of one tree is a leaf of the other: up and down together four streams leave it, each of half
    of the bytes (two and three where there are but two or three nodes), and share its ports; so do four of a GPU inside
    a chain its NVLink. The time is the longest of three: the ports are busy from the first chunk's way up a chain until
    the last one's way down the tree; or NVLink is until the last one's way down; or chunks follow the first one's way
    up and down. Where several are about as long none hides the others wholly: a norm of high order stands for that.
    Its order, and how many chunks fill and drain a tree, are fitted to trees played through (tests/plan/test_tree.py):
    of others at random, 9 in 10 are within 5 % and all within 12 %.
    """
    nodes, chain = where.nodes, -(-where.size // where.nodes) - 1
    depth = math.ceil(math.log2(nodes))
    chunks = tree_chunks(payload, where, network)
    chunk = payload / 2 / chunks / protocol.share
    port, link = chunk / where.ports(network) if depth else 0.0, chunk / network.nvlink
    # Streams that leave a node; chunks that pass its ports: to fill and drain them, on the first one's way, behind it.
    out, fill_and_drain, first, each = {1: (0, 0, 0, 0), 2: (2, 0, 2, 1), 3: (3, min(3.4, chunks), 4, 1)}.get(
        nodes, (4, 4.6 * math.log2(nodes) - 8.2, 2 * (depth + math.log2(nodes)) - 2, 2)
    )
    up, along = depth * protocol.hop, chain * protocol.step
    by_ports = (chunks * out + fill_and_drain) * port + up + 2 * along + 2 * chain * link if out else 0.0
    beside = 2 * chain * link + up + along if out else (chain - 1) * (4 * link + 2 * protocol.step)
    by_links = chunks * min(2 * chain, 4) * link + beside
    by_way = 2 * (up + along) + first * port + (3 if out else 4) * chain * link
    by_way += (chunks - 1) * max(each * port, 2 * bool(chain) * link)
    order = 8 if out == 4 or (out and chain) else math.inf  # a node, or two or three GPUs, have one that hides the rest
    return protocol.base + float(np.linalg.norm([by_ports, by_links, by_way], order))
