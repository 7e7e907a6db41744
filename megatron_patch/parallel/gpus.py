"""What is known of GPUs and the nodes they come in, each constant with its source. Nothing here imports torch.

Rates are bytes/s (FLOP/s) in one direction, times seconds. Where two sources differ the lower one stands here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 2**30

# Dense bf16 peaks in FLOP/s by a part of the device's name, from the makers' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12}

# What large collectives get of a port's line rate: 24 of the 25 GB/s of an HDR port (S. Jeaugey, NVIDIA/nccl #412; the
# same measured on one port of an A100 node, NVIDIA/nccl #1048), 46 to 48 of the 50 of an NDR port (NVIDIA/nccl-tests
# #290): 0.92 to 0.96.
PORT_SHARE = 0.95


@dataclass(frozen=True)
class Network:
    """What joins the GPUs of a node, and nodes."""

    nvlink: float  # bus bandwidth of a ring inside a node
    node: float  # what large collectives get of all ports of a node together
    gpu_link: float  # what one GPU can bring to the ports: its PCIe link
    latency: float = 1.0  # of a collective, in units of what NCCL's own table says (plan/collectives.py)

    def with_ports(self, ports: int, gbits: float) -> Network:
        """The same with so many ports a node, of that line rate in Gb/s."""
        return replace(self, node=ports * gbits * 1e9 / 8 * PORT_SHARE)


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node."""

    memory: int  # bytes
    peak_flops: float  # dense bf16
    matmul_flops: float  # what a large bf16 matrix product reaches
    copy: float  # bytes read and written by a copy in device memory
    watts: float  # board power, the most it draws
    network: Network
    per_node: int = 8

    def with_ports(self, ports: int, gbits: float) -> Gpu:
        return replace(self, network=self.network.with_ports(ports, gbits))

    def with_ranks(self, per_node: int) -> Gpu:
        """The same in nodes of which so many ranks are used."""
        return replace(self, per_node=per_node)


# NVLink, the bus bandwidth that nccl-tests reports for a ring of 8: A100 232.5 GB/s (NVIDIA/nccl #1048; NCCL's own
# model ends at 235, src/graph/tuning.cc), H100 370 (S. Jeaugey, NVIDIA/nccl-tests #212). PCIe: 16 lanes of generation
# 4 and 5, which a port of 200 and 400 Gb/s fills.
_A100_LINKS = Network(232.5e9, 0.0, 24e9).with_ports(8, 200)  # DGX A100
_H100_LINKS = Network(370e9, 0.0, 48e9).with_ports(8, 400)  # DGX H100 and H200

# Matrix products: A100 271.2 TFLOP/s (stas00/ml-engineering, "maximum achievable matmul FLOPS"), H100 798.7 (measured,
# benchmarks/gpu_h100_2026-11-26.md), and H200, whose cores are the same. Copies: H100 3.03 TB/s, measured there, which
# is 0.904 of the data sheet's 3.35; the same share of 1.555, 2.039 and 4.8 TB/s. Board power: data sheets (SXM).
_A100 = Gpu(80 * GIB, PEAK_FLOPS["A100"], 271.2e12, 1.84e12, 400.0, _A100_LINKS)
_H100 = Gpu(80 * GIB, PEAK_FLOPS["H100"], 798.7e12, 3.03e12, 700.0, _H100_LINKS)

GPUS = {
    "a100-40g": replace(_A100, memory=40 * GIB, copy=1.41e12),
    "a100-80g": _A100,
    "a100-80g-2-ports": _A100.with_ports(2, 200),  # the paper's nodes (section 3.3)
    "h100": _H100,
    "h200": replace(_H100, memory=141 * 10**9, copy=4.34e12),
}
