"""What the ladder found: tables in Markdown and CSV, and a picture."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import dataclass
from itertools import groupby

from matplotlib.figure import Figure

from benchmarks.ladder_queue import REFERENCE, Ladder, every_result
from data_tools.files.durable import write_beside, write_whole
from megatron_patch.model import counts

MEETINGS = ("tokens", "FLOPs")
SIGN = f"Difference: held-out loss of the arm less that of `{REFERENCE}`; above 0, sharing is better."


@dataclass(frozen=True)
class Point:
    """One run at one budget: `budget` are tokens of `shared`, `meets` what is equal to its; loss in nats a token."""

    budget: int
    meets: str
    arm: str
    seed: int
    rate: float
    steps: int
    tokens: int
    flops: int
    held_out_loss: float
    minus_shared: float | None
    commit: str


def points(ladder: Ladder) -> list[Point]:
    """Every finished run at every budget; `minus_shared` where `shared` has the seed too."""
    results = {(case.arm, case.seed): result for case, result in every_result(ladder)}
    found = []
    for budget in ladder.protocol.tokens:
        for meets in MEETINGS:
            for (arm, seed), result in results.items():
                steps = ladder.steps(arm, budget, meets)
                tokens = steps * ladder.tokens_a_step(arm)
                loss = _loss(result["losses"], steps)
                other = results.get((REFERENCE, seed))
                paired = other and loss - _loss(other["losses"], ladder.steps(REFERENCE, budget, meets))
                flops = tokens * ladder.flops_per_token(arm)
                point = (budget, meets, arm, seed, result["rate"], steps, tokens, flops, loss, paired, result["commit"])
                found.append(Point(*point))
    return found


def _loss(losses: dict[str, float | None], steps: int) -> float:
    loss = losses[str(steps)]
    return math.nan if loss is None else loss


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95 % t-interval; infinite for one pair."""
    from scipy.stats import t  # not needed where runs are made

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _groups(found: list[Point]) -> list[tuple[tuple[int, str, str], list[Point]]]:
    def key(point: Point) -> tuple[int, str, str]:
        return point.budget, point.meets, point.arm

    return [(name, list(group)) for name, group in groupby(sorted(found, key=key), key)]


def markdown(ladder: Ladder, found: list[Point]) -> str:
    """The arms, the sweep, the comparison and how far the queue has come."""
    lines = [
        "| Arm | Layers | Width | FFNs x width | Parameters without embeddings | Applied | MFLOP a token | Rate |",
        f"|---|{'---:|' * 7}",
    ]
    for arm in (REFERENCE, *(a for a in ladder.arms if a != REFERENCE)):
        model = ladder.recipes[arm].model
        n = counts.parameters(model)
        rest = n.embedding + n.head
        rate, _ = ladder.sweep(arm)
        lines.append(
            f"| {arm} | {model.num_layers} | {model.hidden_size} | {model.ffn_count} x {model.ffn_hidden_size} "
            f"| {n.unique - rest:,} | {n.applied - rest:,} | {ladder.flops_per_token(arm) / 1e6:.2f} "
            f"| {'-' if rate is None else f'{rate:g}'} |"
        )
    lines += [
        "",
        "| Tokens of shared | Equal | Arm | Tokens | TFLOP | Loss, mean | Difference | 95 % interval | Seeds |",
        f"|---:|---|---|{'---:|' * 6}",
    ]
    for (budget, meets, arm), group in _groups(found):
        pairs = [p.minus_shared for p in group if p.minus_shared is not None]
        difference, interval = "", ""
        if arm != REFERENCE and pairs:
            mean, half = mean_interval(pairs)
            difference, interval = f"{mean:+.4f}", f"{mean - half:+.4f} to {mean + half:+.4f}"
        elif meets != MEETINGS[0]:
            continue  # the same runs as at equal tokens
        loss = statistics.fmean(p.held_out_loss for p in group)
        seeds = ", ".join(str(seed) for seed in sorted(p.seed for p in group))
        lines.append(
            f"| {budget:,} | {meets} | {arm} | {group[0].tokens:,} | {group[0].flops / 1e12:.2f} | {loss:.4f} "
            f"| {difference} | {interval} | {seeds} |"
        )
    commits = ", ".join(sorted({p.commit for p in found}))
    done = len({(p.arm, p.seed) for p in found})
    lines += ["", SIGN, "", f"{done} of {ladder.planned} runs; commit {commits}."]
    return "\n".join(lines) + "\n"


def draw(ladder: Ladder, found: list[Point]) -> Figure:
    """Left: mean loss against FLOPs; right: mean paired differences with their intervals."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    for arm in ladder.arms:
        of_arm = [p for p in found if p.arm == arm]
        by_flops = {f: [p.held_out_loss for p in of_arm if p.flops == f] for f in sorted({p.flops for p in of_arm})}
        curves.plot([f / 1e12 for f in by_flops], [statistics.fmean(v) for v in by_flops.values()], "o-", label=arm)
    curves.set(xscale="log", xlabel="training TFLOP", ylabel="held-out loss, nats a token")
    curves.legend()
    names, means, halves = [], [], []
    for (budget, meets, arm), group in reversed(_groups(found)):
        pairs = [p.minus_shared for p in group if p.minus_shared is not None]
        if arm != REFERENCE and len(pairs) > 1:
            mean, half = mean_interval(pairs)
            names.append(f"{arm}, {budget / 1e6:.2g}M, equal {meets}")
            means.append(mean)
            halves.append(half)
    if names:
        differences.errorbar(means, names, xerr=halves, fmt="o", capsize=3)
    differences.axvline(0, color="gray", linewidth=1)
    differences.set(xlabel="loss of the arm less that of shared (right of 0: sharing is better)")
    return figure


def report(ladder: Ladder) -> str:
    """Writes ladder.csv, ladder.md and ladder.png of what is finished, and returns the Markdown."""
    found = points(ladder)
    if not found:
        return "no run is finished yet"
    table = io.StringIO()
    writer = csv.DictWriter(table, list(Point.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(point) for point in found)
    write_whole(ladder.out / "ladder.csv", table.getvalue().encode())
    text = markdown(ladder, found)
    write_whole(ladder.out / "ladder.md", text.encode())
    with write_beside(ladder.out / "ladder.png") as stream:
        draw(ladder, found).savefig(stream, format="png", dpi=120)
    return text
