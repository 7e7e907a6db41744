"""The paper's figures (arXiv 2402.16840): Tables 1, 4, 5, 6, 8 and 9, and what Figure 1 compares.

Scores in percent, in the order of `evaluate.suite.BENCHMARKS`; averages as printed. The 0.8B's text average of 49.06 is
large-base's (docs/errata.md).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """A model's line in one of the paper's tables; `parameters` as printed."""

    model: str
    parameters: str
    scores: tuple[float, ...]
    average: float | None


TABLE_4 = (
    PaperRow("gpt-neo-125m", "0.15B", (30.26, 45.58, 25.97, 22.95, 61.55, 62.46, 27.56, 40.33, 51.78), 40.93),
    PaperRow("tiny-starcoder", "0.17B", (28.17, 47.68, 26.79, 20.99, 49.68, 52.55, 25.45, 38.28, 51.22), 37.86),
    PaperRow("cerebras-gpt-256m", "0.26B", (28.99, 45.98, 26.83, 22.01, 60.52, 61.42, 27.46, 40.53, 52.49), 40.69),
    PaperRow("opt-350m", "0.35B", (36.73, 40.83, 26.02, 23.55, 64.12, 64.74, 29.85, 41.55, 52.64), 42.22),
    PaperRow("megatron-gpt2-345m", "0.38B", (39.18, 41.51, 24.32, 24.23, 64.82, 66.87, 31.19, 40.28, 52.96), 42.81),
    PaperRow("LiteLlama", "0.46B", (38.47, 41.59, 26.17, 24.91, 62.90, 67.73, 28.42, 40.27, 49.88), 42.26),
    PaperRow("gpt-sw3-356m", "0.47B", (37.05, 42.55, 25.93, 23.63, 61.59, 64.85, 32.15, 41.56, 53.04), 42.48),
    PaperRow("pythia-410m", "0.51B", (40.85, 41.22, 27.25, 26.19, 64.20, 67.19, 30.71, 41.40, 53.12), 43.57),
    PaperRow("xglm-564m", "0.56B", (34.64, 40.43, 25.18, 24.57, 62.25, 64.85, 29.28, 42.68, 53.03), 41.87),
    PaperRow("Lamini-GPT-LM 0.59B", "0.59B", (31.55, 40.72, 25.53, 24.23, 63.09, 63.87, 29.95, 40.78, 47.75), 40.83),
    PaperRow("MobiLlama 0.5B", "0.5B", (52.52, 38.05, 26.45, 29.52, 64.03, 72.03, 33.68, 40.22, 57.53), 46.00),
    PaperRow("Lamini-GPT-LM 0.77B", "0.77B", (43.83, 40.25, 26.24, 27.55, 66.12, 69.31, 37.12, 42.47, 56.59), 45.49),
    PaperRow("MobiLlama 0.8B", "0.8B", (54.09, 38.48, 26.92, 30.20, 64.82, 73.17, 33.37, 41.60, 57.45), 46.67),
)
TABLE_5 = (
    PaperRow("baseline1", "0.54B", (42.44, 38.46, 25.08, 26.18), 33.04),
    PaperRow("baseline2", "0.52B", (42.15, 38.70, 25.73, 26.10), 33.17),
    PaperRow("MobiLlama", "0.52B", (44.47, 40.12, 26.48, 26.53), 34.40),
)
"""HellaSwag, TruthfulQA, MMLU and ARC after 100B tokens."""

TABLE_9 = (PaperRow("large-base", "1.2B", (62.99, 35.90, 24.79, 34.55, 68.49, 75.57, 35.31, 41.96, 62.03), 49.06),)

TABLE_8 = (PaperRow("MobiLlama-V", "0.8B", (58.5, 53.1, 41.4, 1191.9), None),)
"""GQA, ScienceQA with images, TextVQA, and the points of MME's perception."""


@dataclass(frozen=True)
class CostRow:
    """A line of Table 1, on 80 GB A100s; `recipe` is the recipe of that model here."""

    model: str
    recipe: str
    parameters: str
    gpu_hours: float
    memory_gb: float
    days: float


TABLE_1 = (
    CostRow("baseline1", "baseline1", "0.54B", 28_800, 3.2, 7.5),
    CostRow("baseline2", "baseline2", "0.52B", 26_900, 3.0, 7.0),
    CostRow("large-base", "large_base", "1.2B", 46_100, 6.0, 12.0),
    CostRow("MobiLlama", "mobillama_05b", "0.52B", 26_600, 3.0, 7.0),
)


@dataclass(frozen=True)
class DeviceRow:
    """A line of Table 6: speed, memory, and battery for 1,000 tokens (mAh; None where not printed)."""

    platform: str
    model: str
    recipe: str
    tokens_per_second: float
    memory_mb: float
    battery_mah: float | None


TABLE_6 = (
    DeviceRow("RTX2080Ti, bf16", "large-base", "large_base", 50.61, 6254, 18.91),
    DeviceRow("RTX2080Ti, bf16", "MobiLlama", "mobillama_05b", 63.38, 3046, 8.19),
    DeviceRow("i7, 4 bits (GGUF)", "large-base", "large_base", 29.23, 1163, None),
    DeviceRow("i7, 4 bits (GGUF)", "MobiLlama", "mobillama_05b", 36.32, 799, None),
    DeviceRow("Snapdragon-685, 4 bits (GGUF)", "large-base", "large_base", 6.687, 780, 6.00),
    DeviceRow("Snapdragon-685, 4 bits (GGUF)", "MobiLlama", "mobillama_05b", 7.021, 770, 5.32),
)
