"""What is known of GPUs and their nodes, from the makers' data sheets. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

# Dense bf16 peaks in FLOP/s by a part of the device's name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12}


@dataclass(frozen=True)
class Gpu:
    """A GPU in the node it usually comes in. Bandwidths are bytes/s a GPU, one direction."""

    memory: int  # bytes
    peak_flops: float  # dense bf16
    inside: float  # NVLink
    outside: float  # the node's network, divided by its GPUs
    per_node: int = 8


GPUS = {
    # DGX A100: 12 NVLink of 25 GB/s; eight 200 Gb/s ports for eight GPUs. The paper's nodes had two ports for eight.
    "a100-40g": Gpu(40 * GIB, PEAK_FLOPS["A100"], 300e9, 25e9),
    "a100-80g": Gpu(80 * GIB, PEAK_FLOPS["A100"], 300e9, 25e9),
    "a100-80g-2-ports": Gpu(80 * GIB, PEAK_FLOPS["A100"], 300e9, 6.25e9),
    "h100": Gpu(80 * GIB, PEAK_FLOPS["H100"], 450e9, 50e9),
    "h200": Gpu(141 * 10**9, PEAK_FLOPS["H200"], 450e9, 50e9),
}
