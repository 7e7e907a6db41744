"""The shared FFN's gradient: against an untied twin, against float64, and who counts it."""

import pytest
import torch

from megatron_patch.model.parameters import local_parameters
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_share, toy_trainer


def gradients(trainer) -> dict[str, torch.Tensor]:
    """fp32 gradients of one global batch, before any reduction (one rank: already the whole sum)."""
    trainer.optimizer.clear_gradients()
    trainer._run(toy_share(trainer, 0), tokens=trainer.recipe.batch.global_batch_size * 16, forward_only=False)
    return {w.name: p.main_grad.clone() for w, p in local_parameters(trainer.chunks, trainer.recipe.model)}


def shared_and_untied(recompute: str):
    shared = toy_trainer(toy_recipe("model.shared_ffn=true", f"recompute={recompute}"))
    untied = toy_trainer(toy_recipe("model.shared_ffn=false", f"recompute={recompute}"))
    weights = {w.name: p for w, p in local_parameters(shared.chunks, shared.recipe.model)}
    with torch.no_grad():
        for whole, parameter in local_parameters(untied.chunks, untied.recipe.model):
            name = whole.name if ".mlp." not in whole.name else "ffn." + whole.name.split(".mlp.")[1]
            parameter.copy_(weights[name])
    return gradients(shared), gradients(untied)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_shared_gradient_is_the_sum_over_the_layers_of_an_untied_twin(recompute):
    shared, untied = run_ranks(1, shared_and_untied, recompute)[0]
    for matrix in ("linear_fc1.weight", "linear_fc2.weight"):
        total = sum(untied[f"layers.{i}.mlp.{matrix}"] for i in range(4))
        assert untied[f"layers.0.mlp.{matrix}"].norm() > 0.1 * total.norm()  # every layer contributes
        assert (shared[f"ffn.{matrix}"] - total).norm() < 1e-6 * total.norm()
    for name in shared:
        if not name.startswith("ffn."):
            assert (shared[name] - untied[name]).norm() < 1e-6 * untied[name].norm(), name


def bf16_error_against_float64() -> dict[str, tuple[float, float]]:
    """By FFN matrix: relative error of our fp32 gradient and of autograd's own bf16 sum, 22 layers, one micro-batch."""
    trainer = toy_trainer(
        toy_recipe("precision=bf16", "model.shared_ffn=true", "model.num_layers=22", "batch.micro_batch_size=8")
    )
    ffn = trainer.chunks[0].decoder.layers[0].mlp
    exact = {"fc1": 0.0, "fc2": 0.0}

    def record(name):
        def on_forward(module, inputs, output):
            x = inputs[0].detach().double().flatten(0, 1)

            def on_gradient(dy):
                exact[name] = exact[name] + dy.double().flatten(0, 1).t() @ x

            output[0].register_hook(on_gradient)

        return on_forward

    hooks = [ffn.linear_fc1.register_forward_hook(record("fc1")), ffn.linear_fc2.register_forward_hook(record("fc2"))]
    ours = gradients(trainer)
    for hook in hooks:
        hook.remove()

    plain = {}
    for name, linear in (("fc1", ffn.linear_fc1), ("fc2", ffn.linear_fc2)):
        linear.gradient_accumulation_fusion = False
        linear.weight.main_grad = torch.zeros_like(linear.weight.main_grad)
        plain[name] = linear.weight
    summed = gradients(trainer)
    errors = {}
    for name in exact:
        norm = exact[name].norm()
        key = f"ffn.linear_{name}.weight"
        errors[name] = (
            ((ours[key].double() - exact[name]).norm() / norm).item(),
            ((summed[key].double() - exact[name]).norm() / norm).item(),
        )
    return errors


def test_shared_gradient_accumulates_in_fp32():
    for name, (ours, autograd) in run_ranks(1, bf16_error_against_float64)[0].items():
        assert autograd > 1e-4, f"{name}: autograd's sum is unexpectedly exact; the comparison shows nothing"
        assert ours * 1000 < autograd, f"{name}: ours {ours:.1e}, autograd's bf16 sum {autograd:.1e}"


def optimizer_bytes(zero_stage: int) -> dict[str, float]:
    trainer = toy_trainer(toy_recipe(f"parallel.zero_stage={zero_stage}", "precision=bf16"))
    trainer.step(toy_share(trainer, 0), 1e-4)
    optimizer = trainer.optimizer
    mine = 0
    for group, master in enumerate(optimizer.master_shards):
        moments = optimizer.moments(group)
        assert master.dtype == moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32
        mine += sum(t.untyped_storage().nbytes() for t in (master, moments["exp_avg"], moments["exp_avg_sq"]))
    return {
        "mine": mine,
        "groups": len(optimizer.groups),
        "parameters": sum(p.numel() for g in optimizer.groups for p in g.parameters),
        "gradient_bytes": sum(b.flat.untyped_storage().nbytes() for b in optimizer.buffers),
    }


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_each_rank_holds_its_share_of_the_optimizer_state(zero_stage):
    ranks = 3
    for answer in run_ranks(ranks, optimizer_bytes, zero_stage):
        whole = 12 * answer["parameters"]
        alignment = answer["groups"] * 12 * 2  # DeepSpeed pads each group to 2 elements a rank
        assert abs(answer["mine"] - whole / ranks) <= alignment
        if zero_stage == 2:
            assert answer["gradient_bytes"] == 0  # only the shards outlive the reduction
        else:
            assert answer["gradient_bytes"] >= 4 * answer["parameters"]


def norm_of_one_batch(overrides: list[str]) -> tuple[float, float]:
    """The norm a step reports and that of the gathered gradient of one rank."""
    trainer = toy_trainer(toy_recipe(*overrides))
    reported = trainer.step(toy_share(trainer, 0), 0.0).grad_norm
    own = gradients(trainer)
    return reported, torch.cat([g.double().flatten() for g in own.values()]).norm().item()


def test_norm_counts_every_parameter_once():
    overrides = ["model.shared_ffn=true"]
    reported, by_hand = run_ranks(1, norm_of_one_batch, overrides)[0]
    assert reported == pytest.approx(by_hand, rel=1e-6)
    everywhere = [*overrides, "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    for answer in run_ranks(4, norm_of_one_batch, everywhere):
        assert answer[0] == pytest.approx(by_hand, rel=1e-5)


def withheld_update() -> tuple[bool, bool]:
    trainer = toy_trainer(toy_recipe("model.shared_ffn=true"))
    before = [p.detach().clone() for _, p in local_parameters(trainer.chunks, trainer.recipe.model)]
    with torch.no_grad():
        trainer.chunks[0].decoder.final_layernorm.weight[0] = float("nan")
    result = trainer.step(toy_share(trainer, 0), 1e-2)
    after = [p.detach() for _, p in local_parameters(trainer.chunks, trainer.recipe.model)]
    return result.applied, sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) == 1


def test_a_step_that_is_not_finite_changes_nothing():
    for applied, only_the_poison_differs in run_ranks(2, withheld_update):
        assert not applied and only_the_poison_differs
