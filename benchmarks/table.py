"""The GPU benchmark's results as Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks import measure

MODELS = ("mobillama_05b", "mobillama_08b", "large_base")  # recipes
NOT_DETERMINISTIC = ", run.deterministic=false"  # behind the name of a case that was measured so


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: one table of cases, one of parts, one of kernels, and the ratios."""
    lines = [
        f"# Speed on one {results['device']}, {results['date']}",
        "",
        f"Commit {results['commit']}, torch {results['torch']}, Python {results['python']}: `{results['command']}`",
        "",
    ]
    if ceilings := results.get("ceilings"):
        lines += [
            f"Ceilings in this run: bf16 matmul {ceilings['matmul_flops'] / 1e12:.4g} TFLOP/s, "
            f"copy {ceilings['copy_bytes_per_second'] / 1e12:.3g} TB/s. "
            "FLOPs are counted without recomputation, causal attention as half.",
            "",
        ]
    if results["cases"]:
        lines += ["| | micro-batch | tokens/s | TFLOP/s | of ceiling | peak GB | planned GB | state GB |"]
        lines += ["|---|" + "---:|" * 7]
    for c in results["cases"]:
        peak = "" if c["peak_memory"] is None else f"{c['peak_memory'] / 1e9:.1f}"
        planned, held = (f"{c[k] / 1e9:.4g}" if k in c else "" for k in ("planned_memory", "state_bytes"))
        lines.append(
            f"| {c['name']} | {c['micro_batch']} | {c['tokens_per_second']:,.0f} | {c['flops'] / 1e12:.4g} "
            f"| {c['share_of_ceiling']:.1%} | {peak} | {planned} | {held} |"
        )
    lines += ["", *ratios(results["cases"])]
    if results["breakdowns"]:
        lines += ["", "Share of a step's time by part (device time of kernels; gaps are the rest):", ""]
        lines += ["| | " + " | ".join((*measure.PARTS, "gaps")) + " |", "|---|" + "---:|" * (len(measure.PARTS) + 1)]
    for b in results["breakdowns"]:
        shares = [b[part] / b["step_seconds"] for part in measure.PARTS]
        shares.append(1 - b["busy"] / b["step_seconds"])
        lines.append(f"| {b['name']}, {b['micro_batch']} | " + " | ".join(f"{s:.1%}" for s in shares) + " |")
    if results["kernels"]:
        lines += ["", "Forward and backward of each kernel, microseconds:", "", "| | implementation | µs |"]
        lines += [
            "|---|---|---:|",
            *(f"| {k['kernel']} | {k['by']} | {k['seconds'] * 1e6:,.0f} |" for k in results["kernels"]),
        ]
    for key in ("chosen_kernels", "weight_gradients_by", "bit_equal_run_to_run", "host_waits_a_step"):
        if key in results:
            lines += ["", f"{key.replace('_', ' ').capitalize()}: {results[key]}"]
    lines += ["", *(f"- {note}" for note in results["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def ratios(cases: list[dict[str, Any]]) -> list[str]:
    """Best against best; a ratio whose two sides were not measured is left out."""
    best: dict[str, dict[str, Any]] = {}
    for c in cases:
        if c["name"] not in best or c["tokens_per_second"] > best[c["name"]]["tokens_per_second"]:
            best[c["name"]] = c
    own = [*MODELS, *(name + NOT_DETERMINISTIC for name in MODELS)]
    pairs = [(name + NOT_DETERMINISTIC, name) for name in MODELS]
    pairs += [(ours, peer) for peer in best if peer not in own for ours in (MODELS[0], MODELS[0] + NOT_DETERMINISTIC)]
    lines = [
        f"- {one} / {other}, each at its best micro-batch: "
        f"{best[one]['tokens_per_second'] / best[other]['tokens_per_second']:.2f} times the tokens/s"
        for one, other in pairs
        if one in best and other in best
    ]
    if MODELS[0] in best and "large_base" in best:
        ratio = best["large_base"]["state_bytes"] / best[MODELS[0]]["state_bytes"]
        lines.append(f"- large_base / {MODELS[0]}, bytes of weights, gradients and optimizer state: {ratio:.2f}")
    return lines
