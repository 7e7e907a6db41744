"""A plan as text."""

from __future__ import annotations

from megatron_patch.model import counts
from megatron_patch.model.parameters import whole_tensors
from megatron_patch.parallel.gpus import GIB
from megatron_patch.plan.memory import Memory, memory
from megatron_patch.plan.plan import GPU_HOURS_BETWEEN_FAILURES, RESERVED, Plan
from megatron_patch.vision.shapes import flops_per_image


def text(plan: Plan, energy: str) -> str:
    s = plan.settings
    n, p = counts.parameters(s.model), s.parallel
    first = plan.places[0]
    flops = counts.flops_per_row(s, plan.images_per_row) / s.model.sequence_length
    lines = [
        f"{s.name}: TP{p.tensor} x PP{p.pipeline} x DP{first.data_size}, ZeRO-{p.zero_stage}, {s.precision}, recompute "
        f"{s.recompute}, on {plan.hardware}",
        "",
        f"parameters          {n.unique:,} unique (memory, checkpoints), {n.applied:,} applied (compute)",
        *_image_lines(plan),
        f"FLOPs               {flops / 1e9:.2f} GFLOP a token, forward and backward, causal"
        + ", images included" * (s.model.vision is not None),
        f"batch               {s.batch.global_batch_size} rows = {plan.tokens_per_step:,} tokens: "
        f"{first.micro_batches} micro-batches of {s.batch.micro_batch_size} a rank"
        + (f", {1 - plan.unpadded_share:.1%} of them padding" if plan.unpadded_share < 1 else ""),
        f"length              {plan.steps:,} steps, {_tokens(plan.steps * plan.tokens_per_step)} tokens"
        + ("" if s.run.steps else f": {_data(plan)}"),
        "",
        *_memory_lines(plan),
        "",
        *_traffic_lines(plan),
        "",
        *_step_lines(plan),
        f"run                 {_duration(plan)}",
        f"energy              {energy}",
        f"failures            {plan.failures:.1f} expected; effective time {plan.effective_share:.1%}",
        "",
        *_storage_lines(plan),
        "",
        f"assumed             {_assumed(plan)}",
    ]
    return "\n".join(lines)


def _image_lines(plan: Plan) -> list[str]:
    """Of a model that sees."""
    s, vision = plan.settings, plan.settings.model.vision
    if vision is None:
        return []
    sizes: dict[str, int] = {}
    for whole in whole_tensors(s.model).values():
        sizes[whole.of] = sizes.get(whole.of, 0) + whole.numel()
    frozen = s.optimizer.frozen
    note = f"; {' and '.join(frozen)} have an fp32 master too, no gradient and no moments" if frozen else ""
    parts = ", ".join(f"{part} {n:,}{' (frozen)' * (part in s.optimizer.frozen)}" for part, n in sizes.items())
    each = flops_per_image(vision, s.model.hidden_size, encoder_trained="encoder" not in s.optimizer.frozen)
    return [
        f"parts               {parts}{note}",
        f"images              {vision.tokens} tokens and {each / 1e9:,.1f} GFLOP each, {plan.images_per_row:.2f} a row "
        f"on average, {plan.images_per_row * s.batch.global_batch_size:,.0f} a step",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    lines = ["GiB a GPU           weights  gradients  optimizer  activations  working   total"]
    for place in plan.places:
        m: Memory = memory(place)
        lines.append(
            f"  stage {place.stage:<11} {m.weights / GIB:8.2f} {m.gradients / GIB:10.2f} {m.optimizer / GIB:10.2f} "
            f"{m.activations / GIB:12.2f} {m.working / GIB:8.2f} {m.total / GIB:7.2f}"
        )
    lines.append(f"  with reserve {plan.needed / GIB:48.2f} of {plan.gpu.memory / GIB:.2f}")
    return lines


def _traffic_lines(plan: Plan) -> list[str]:
    lines = ["bytes a step        sent by the busiest rank                                     seconds on the wire"]
    lines += [
        f"  {item.group:<9} {item.sent / GIB:8.3f} GiB  {item.operation} of {item.what} over {item.size}".ljust(76)
        + f"{seconds:7.3f}"
        for item, seconds in plan.traffic()
    ]
    return lines


def _step_lines(plan: Plan) -> list[str]:
    step = plan.step
    waits = ", ".join(f"{what} {wait:.4f}" for what, wait in sorted(step.waits.items(), key=lambda w: -w[1]))
    return [
        f"step                {step.seconds:.3f} s, {plan.mfu:.1%} MFU of {plan.gpu.peak_flops / 1e12:.0f} TFLOP/s "
        f"dense bf16: {plan.tokens_per_second / plan.ranks:,.0f} tokens/s a GPU, {plan.tokens_per_second:,.0f} in all",
        f"  computed          {step.rows:.3f} s rows, {step.padding:.3f} padding, {step.update:.4f} clipping and AdamW",
        f"  waited for        {step.waited:.4f} s, {step.waited / step.seconds:.1%}" + (f": {waits}" if waits else ""),
        f"  hidden            {step.hidden:.4f} s of traffic beside computation",
        f"  bound by          {step.bound_by}",
    ]


def _storage_lines(plan: Plan) -> list[str]:
    full, weights = plan.checkpoint_bytes
    keep = plan.settings.checkpoint.keep
    total, whole = plan.milestones
    kept = keep * full + whole * full + (total - whole) * weights
    rows = min(plan.steps * plan.settings.batch.global_batch_size, plan.segments * plan.rows)
    data = rows * plan.settings.row_length * 2
    return [
        f"restart checkpoints {full / 1e9:.1f} GB each, {keep} kept",
        f"milestones          {total}, {weights / 1e9:.1f} GB each; {whole} of them with the optimizer",
        f"storage             {_size(kept)} of checkpoints, {_size(data)} of indexed data",
        *_disk_lines(plan),
    ]


def _disk_lines(plan: Plan) -> list[str]:
    """Where a check measured the disk."""
    disk, seconds = plan.hardware.disk, plan.save_seconds
    if disk is None or seconds is None:
        return []
    every = "" if plan.save_interval == float("inf") else f" of every {plan.save_interval:,.0f}"
    rates = f"{disk.write / 1e9:.3g} GB/s written" + ("" if disk.read is None else f", {disk.read / 1e9:.3g} read")
    return [
        f"disk                {rates} by a node while all do: a save is durable after {seconds:,.1f} s{every}, beside "
        f"training; a node needs rows at {plan.row_bytes_per_second / 1e6:,.2f} MB/s",
    ]


def _data(plan: Plan) -> str:
    epochs = plan.settings.data.epochs
    segments = f"{plan.segments} segment{'s' * (plan.segments > 1)} of {plan.rows:,} rows"
    return segments + (f", in {epochs} epochs" if epochs > 1 else "")


def _duration(plan: Plan) -> str:
    if plan.days < 1:
        return f"{plan.days * 24:.2g} hours, {plan.gpu_hours:,.3g} GPU hours"
    return f"{plan.days:.1f} days, {plan.gpu_hours / 1e3:.1f}K GPU hours"


def _tokens(count: int) -> str:
    return f"{count / 1e9:,.1f}B" if count >= 1e9 else f"{count / 1e6:,.1f}M"


def _size(count: float) -> str:
    return f"{count / 1e12:.2f} TB" if count >= 1e11 else f"{count / 1e9:.2f} GB"


def _assumed(plan: Plan) -> str:
    gpu, mfu = plan.gpu, plan.hardware.mfu
    pace = (
        f"matrix products at {gpu.matmul_flops / 1e12:.4g} TFLOP/s and copies at {gpu.copy / 1e12:.3g} TB/s, of which "
        "a step reaches the shares measured on an H100 (plan/compute.py)"
        if mfu is None
        else f"{mfu:.0%} MFU of the computation alone"
    )
    return (
        f"rates: {plan.hardware.rates}; {pace}; NVLink {gpu.network.nvlink / 1e9:.3g} GB/s a GPU, all ports of a node "
        f"{gpu.network.node / 1e9:.3g} GB/s, latencies {gpu.network.latency:.3g} times NCCL's own table "
        f"(plan/collectives.py); {RESERVED / GIB:.0f} GiB reserved for CUDA, NCCL and fragments; a failure every "
        f"{GPU_HOURS_BETWEEN_FAILURES:,.0f} GPU hours (7.9 h at 1,024 GPUs), each losing half a checkpoint interval "
        f"and {plan.restart_minutes:g} minutes"
    )
