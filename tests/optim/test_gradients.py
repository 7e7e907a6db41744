"""The shared FFN's gradient: against an untied twin, against float64, and who counts it."""

from dataclasses import replace

import pytest
import torch

from megatron_patch.model.parameters import local_parameters
from megatron_patch.train.watchdog import Ceiling
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_shard, toy_trainer


def gradients(trainer) -> dict[str, torch.Tensor]:
    """fp32 gradients of one global batch, before any reduction (one rank: already the whole sum)."""
    trainer.optimizer.clear_gradients()
    shard = toy_shard(trainer, 0)
    trainer._run(shard, shard.labels, forward_only=False)
    return {w.name: p.main_grad.clone() for w, p in local_parameters(trainer.chunks, trainer.recipe.model)}


def shared_and_untied(recompute: str, users: dict[str, list[int]], settings: list[str]):
    shared = toy_trainer(toy_recipe(*settings, f"recompute={recompute}"))
    untied = toy_trainer(toy_recipe("model.num_ffns=null", f"recompute={recompute}"))
    weights = {w.name: p for w, p in local_parameters(shared.chunks, shared.recipe.model)}
    of_layer = {layer: ffn for ffn, layers in users.items() for layer in layers}
    with torch.no_grad():
        for whole, parameter in local_parameters(untied.chunks, untied.recipe.model):
            layer, _, matrix = whole.name.partition(".mlp.")
            name = f"{of_layer[int(layer.removeprefix('layers.'))]}.{matrix}" if matrix else whole.name
            parameter.copy_(weights[name])
    return gradients(shared), gradients(untied)


BLOCKS = {"ffns.0": [0, 1], "ffns.1": [2, 3]}
TURNS = {"ffns.0": [0, 2], "ffns.1": [1, 3]}


@pytest.mark.parametrize(
    ("recompute", "users", "settings"),
    [
        *((recompute, {"ffn": [0, 1, 2, 3]}, ["model.num_ffns=1"]) for recompute in ("none", "selective", "full")),
        ("none", BLOCKS, ["model.num_ffns=2"]),
        ("selective", TURNS, ["model.num_ffns=2", "model.ffn_pattern=cycle"]),
    ],
)
def test_shared_gradient_is_the_sum_over_the_layers_of_an_untied_twin(recompute, users, settings):
    shared, untied = run_ranks(1, shared_and_untied, recompute, users, settings)[0]
    for ffn, layers in users.items():
        for matrix in ("linear_fc1.weight", "linear_fc2.weight"):
            total = sum(untied[f"layers.{i}.mlp.{matrix}"] for i in layers)
            assert untied[f"layers.{layers[0]}.mlp.{matrix}"].norm() > 0.1 * total.norm()  # every layer contributes
            assert (shared[f"{ffn}.{matrix}"] - total).norm() < 1e-6 * total.norm()
    for name in shared:
        if not name.startswith("ffn"):
            assert (shared[name] - untied[name]).norm() < 1e-6 * untied[name].norm(), name


def with_and_without_dummy_gradients(recompute: str):
    """Gradients of one batch, and of the same where mcore hands back a dummy of NaNs for every linear layer."""
    trainer = toy_trainer(toy_recipe("model.num_ffns=1", f"recompute={recompute}", "batch.micro_batch_size=4"))
    expected = gradients(trainer)
    marked = [w for c in trainer.chunks for n, w in c.decoder.named_parameters() if ".linear_" in n]
    for weight in marked:
        weight.grad_added_to_main_grad = False
    torch.use_deterministic_algorithms(True)  # torch then fills what nobody has initialised
    got = gradients(trainer)
    return expected, got, all(weight.grad_added_to_main_grad and weight.grad is None for weight in marked)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_dummy_gradient_of_mcore_is_not_added(recompute):
    expected, got, said = run_ranks(1, with_and_without_dummy_gradients, recompute)[0]
    assert said, "mcore has not handed back a dummy: the test shows nothing"
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def bf16_error_against_float64() -> dict[str, tuple[float, float]]:
    """By FFN matrix: relative error of our fp32 gradient and of autograd's own bf16 sum, 22 layers, one micro-batch."""
    trainer = toy_trainer(
        toy_recipe("precision=bf16", "model.num_ffns=1", "model.num_layers=22", "batch.micro_batch_size=8")
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
    trainer.step(toy_shard(trainer, 0), 1e-4)
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
    reported = trainer.step(toy_shard(trainer, 0), 0.0).grad_norm
    own = gradients(trainer)
    return reported, torch.cat([g.double().flatten() for g in own.values()]).norm().item()


def test_norm_counts_every_parameter_once():
    overrides = ["model.num_ffns=1"]
    reported, by_hand = run_ranks(1, norm_of_one_batch, overrides)[0]
    assert reported == pytest.approx(by_hand, rel=1e-6)
    everywhere = [*overrides, "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    for answer in run_ranks(4, norm_of_one_batch, everywhere):
        assert answer[0] == pytest.approx(by_hand, rel=1e-5)


def state_of(trainer) -> list[torch.Tensor]:
    """Weights, master weights, moments and their step counts of this rank."""
    optimizer = trainer.optimizer
    moments = [t for group in range(len(optimizer.groups)) for t in optimizer.moments(group).values()]
    return [t.detach().clone() for t in (*optimizer.flat_weights, *optimizer.master_shards, *moments)]


def withheld_update(precision: str, wrong: str) -> tuple[bool, bool, bool]:
    """(was the wrong step applied, is the state as before it, was the next one applied and the state another)."""
    trainer = toy_trainer(toy_recipe("model.num_ffns=1", f"precision={precision}"))
    shard = toy_shard(trainer, 0)
    usual = trainer.step(shard, 1e-2).loss
    before = state_of(trainer)
    ceiling = Ceiling(usual - 1.0, 0.5) if wrong == "too high" else None
    bad = shard
    if wrong == "not finite" and trainer.topology.data_rank == 1:
        bad = replace(shard, weights=shard.weights * float("nan"))
    trainer.compute(bad)
    result = trainer.update(1e-2, ceiling=ceiling).result()
    trainer.optimizer.gather()
    same = all(torch.equal(a, b) for a, b in zip(before, state_of(trainer), strict=True))
    after = trainer.step(shard, 1e-2).applied
    return result.applied, same, after and not torch.equal(before[0], state_of(trainer)[0])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("wrong", ["not finite", "too high"])
def test_a_withheld_step_changes_nothing(precision, wrong):
    for applied, same, goes_on in run_ranks(2, withheld_update, precision, wrong):
        assert not applied and same and goes_on
