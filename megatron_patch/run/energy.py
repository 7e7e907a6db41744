"""Energy and carbon of a run: planned from board power and time, or measured by the GPUs' own counters.

As in LLaMA's paper (arXiv 2302.13971, section 6): GPU hours x power of a GPU x PUE, and kg CO2e a kWh of the grid. The
GPUs alone are counted; processors, network and storage of the nodes are not.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_patch.arguments import amount, share

PUE = 1.1
"""Watts a data centre draws for each watt of its machines, as LLaMA's paper sets it."""
GRID = 0.436
"""kg CO2e a kWh: the world's electricity in 2022 (Ember, Global Electricity Review 2023)."""


@dataclass(frozen=True)
class Site:
    """Where energy is drawn: watts drawn a watt of machines, kg CO2e a kWh."""

    pue: float = PUE
    grid: float = GRID


@dataclass(frozen=True)
class Energy:
    """Joules of all GPUs, and what follows at a site."""

    joules: float
    site: Site

    @property
    def kwh(self) -> float:
        """Of GPUs and data centre."""
        return self.joules / 3.6e6 * self.site.pue

    @property
    def carbon(self) -> float:
        """kg CO2e."""
        return self.kwh * self.site.grid

    def __str__(self) -> str:
        return (
            f"{self.kwh:,.4g} kWh, {self.carbon:,.4g} kg CO2e (PUE {self.site.pue:g}, {self.site.grid:g} kg CO2e a kWh)"
        )


def planned(gpu_hours: float, watts: float, utilisation: float, site: Site) -> Energy:
    """`watts`: board power of a GPU; `utilisation`: the share of it that it draws."""
    return Energy(gpu_hours * 3600 * watts * utilisation, site)


def add_energy(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--pue", type=amount, default=PUE, help=f"watts drawn for each watt of machines ({PUE})")
    parser.add_argument("--grid", type=amount, default=GRID, metavar="KG", help=f"kg CO2e a kWh ({GRID})")
    parser.add_argument(
        "--utilisation", type=share, default=1.0, help="share of its board power that a GPU draws (1: the most)"
    )
