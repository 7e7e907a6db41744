"""The learning rate's schedules, by hand-computed values; a cosine against torch's own."""

import pytest
import torch

from megatron_patch.recipe import RecipeError, load
from megatron_patch.train.schedule import learning_rate

TOTAL = 767_880


def test_learning_rate_follows_the_paper():
    optimizer = load("recipes/mobillama_05b.yaml").optimizer
    assert learning_rate(0, optimizer, TOTAL) == 0.0
    assert learning_rate(1000, optimizer, TOTAL) == pytest.approx(1.5e-4)
    assert learning_rate(2000, optimizer, TOTAL) == pytest.approx(3e-4)
    quarter = 2000 + (TOTAL - 2000) // 4  # a linear decay would be at 2.325e-4
    assert learning_rate(quarter, optimizer, TOTAL) == pytest.approx(2.604594e-4, rel=1e-6)
    assert learning_rate((2000 + TOTAL) // 2, optimizer, TOTAL) == pytest.approx(1.65e-4)
    assert learning_rate(TOTAL, optimizer, TOTAL) == 3e-5
    assert learning_rate(TOTAL + 1000, optimizer, TOTAL) == 3e-5


def test_the_cosine_is_torchs():
    optimizer = load("recipes/demo.yaml", ["optimizer.warmup_steps=0"]).optimizer
    parameter = torch.nn.Parameter(torch.zeros(1))
    stock = torch.optim.SGD([parameter], lr=optimizer.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stock, 200, eta_min=optimizer.min_learning_rate)
    for step in range(200):
        assert learning_rate(step, optimizer, 200) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        stock.step()
        schedule.step()


def test_wsd_stays_at_the_peak_and_falls_in_its_last_steps():
    settings = ["optimizer.schedule=wsd", "optimizer.cooldown_steps=100", "optimizer.min_learning_rate=1e-5"]
    optimizer = load("recipes/mobillama_05b.yaml", settings).optimizer
    expected = {1000: 1.5e-4, 2000: 3e-4, 50_000: 3e-4, 99_900: 3e-4, 99_925: 2.275e-4, 99_999: 1.29e-5, 100_000: 1e-5}
    assert {step: learning_rate(step, optimizer, 100_000) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["optimizer.schedule=wsd"], "schedule wsd with cooldown_steps 0: wsd decays over"),
        (["optimizer.cooldown_steps=5"], "schedule cosine with cooldown_steps 5"),
        (
            ["optimizer.schedule=wsd", "optimizer.cooldown_steps=50", "optimizer.decay_steps=2010"],
            r"warmup_steps 2000 \+ cooldown_steps 50 is more than decay_steps 2010",
        ),
        (
            ["optimizer.schedule=wsd", "optimizer.cooldown_steps=50", "run.steps=2010"],
            r"warmup_steps 2000 \+ cooldown_steps 50 is more than run.steps 2010",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        load("recipes/mobillama_05b.yaml", settings)
