"""What a plan is made for: nodes, what they hold, and what is known of its speed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_patch.arguments import amount, count, share
from megatron_patch.parallel.gpus import GPUS, Gpu
from megatron_patch.plan import measured
from megatron_patch.plan.measured import Disk


@dataclass(frozen=True)
class Hardware:
    """Nodes that hold a GPU of `gpus.GPUS`, with what a site says of them."""

    nodes: int
    name: str
    gpu: Gpu
    mfu: float | None = None
    """Model FLOP utilisation of the computation alone, in place of what was measured (compute.py)."""
    rates: str = "data sheets and published figures (parallel/gpus.py)"
    """Where the GPU's and the network's rates are from."""
    disk: Disk | None = None
    """What a `check` measured of it; None: not known."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpu.per_node

    def on(self, nodes: int) -> Hardware:
        return replace(self, nodes=nodes)

    def __str__(self) -> str:
        pace = "" if self.mfu is None else f", computing at {self.mfu:.0%} MFU"
        return f"{self.nodes} node{'s' * (self.nodes > 1)} of {self.gpu.per_node} {self.name}{pace}"


def add_hardware(parser: argparse._ActionsContainer) -> None:
    """What is planned for; `report --compare` plans for the same."""
    parser.add_argument("--nodes", type=count, default=20, help="nodes to run on (20)")
    parser.add_argument("--gpus", choices=GPUS, default="a100-80g", help="what the nodes hold (a100-80g)")
    parser.add_argument("--gpus-per-node", type=count, metavar="N", help="ranks a node (8)")
    parser.add_argument("--ports", type=count, metavar="N", help="network ports of a node, where not those of --gpus")
    parser.add_argument("--port-gbits", type=amount, metavar="GB/S", help="line rate of a port, Gb/s")
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FOLDER",
        help="of a `check`: its rates instead of published ones",
    )
    parser.add_argument(
        "--mfu", type=share, help="model FLOP utilisation of the computation alone (as measured: plan/compute.py)"
    )


def hardware(args: argparse.Namespace) -> Hardware:
    """Of what `add_hardware` parsed. Raises ValueError where half of a network is named or nothing was measured."""
    gpu = GPUS[args.gpus]
    if (args.ports is None) != (args.port_gbits is None):
        raise ValueError("--ports and --port-gbits go together: the number of a node's ports and the line rate of each")
    if args.ports is not None:
        if not args.port_gbits:
            raise ValueError("--port-gbits 0: a port without a rate; leave both options out to keep those of --gpus")
        gpu = gpu.with_ports(args.ports, args.port_gbits)
    if args.gpus_per_node is not None:
        gpu = gpu.with_ranks(args.gpus_per_node)
    if args.measured is None:
        return Hardware(args.nodes, args.gpus, gpu, args.mfu)
    gpu, disk, rates = measured.apply(gpu, args.measured)
    return Hardware(args.nodes, args.gpus, gpu, args.mfu, rates, disk)
