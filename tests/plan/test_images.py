"""What `plan` says of a model that sees: encoder and projector beside the decoder."""

from __future__ import annotations

import re

import pytest

from megatron_patch.plan import memory
from tests import toy
from tests.plan.test_command import plan_of
from tests.plan.test_real_ranks import SAVED, saved_bytes
from tests.ranks import run_ranks

QUICK = [*SAVED, "kernels=reference"]
"""Images do not meet the decoder's kernels, which are slow where Triton interprets them."""


@pytest.fixture(scope="module")
def without() -> int:
    """Bytes that autograd keeps of rows without images."""
    ((_, kept),) = run_ranks(1, saved_bytes, QUICK)
    return int(kept)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("frozen", ["[]", "[encoder]"])
def test_what_autograd_keeps_of_images(frozen: str, activation: str, without: int) -> None:
    """The first two rows have one image: what is kept beyond the decoder's is its encoder's and projector's."""
    seeing = [*QUICK, toy.SEEING[0].replace("quick_gelu", activation)]
    ((_, with_image),) = run_ranks(1, saved_bytes, [*seeing, f"optimizer.frozen={frozen}"])
    place = memory.Place(toy.toy_recipe(*seeing, f"optimizer.frozen={frozen}"), 1, 0)
    behind = 64 * 4  # a row behind the micro-batch's, where the images' tokens of other ranks go
    assert with_image - without == memory.saved_by_image(place) + behind
    most = place.most_images
    assert most == 2 * (17 // 4), "a row of 17 ids"
    decoder = memory.Place(toy.toy_recipe(*QUICK), 1, 0)
    images = memory.memory(place).activations - memory.memory(decoder).activations
    assert images == most * memory.saved_by_image(place)


def test_both_stages_of_the_model_that_sees() -> None:
    """At CLIP-L/336: 3 images of 576 tokens fit into a row. Stage 2's FLOPs by hand, those of the parts apart."""
    found = {}
    for name in ("mobillama_v_align", "mobillama_v"):
        assert "build_vision.py, or set run.steps" in plan_of(f"recipes/{name}.yaml")[2]
        code, text, error = plan_of(f"recipes/{name}.yaml", "--nodes", "1", "--gpus", "h100", "run.steps=2180")
        assert code == 0, error
        assert "1,119,404,544 unique" in text and "3.00 a row on average" in text
        found[name] = {
            what: float(match[1].replace(",", ""))
            for what, pattern in {
                "image": r"576 tokens and ([\d,.]+) GFLOP each",
                "token": r"FLOPs +([\d.]+) GFLOP",
                "step": r"step +([\d.]+) s",
                "gradients": r"stage 0 +[\d.]+ +([\d.]+)",
                "optimizer": r"stage 0 +[\d.]+ +[\d.]+ +([\d.]+)",
            }.items()
            if (match := re.search(pattern, text))
        }
        frozen = "decoder 819,315,200 (frozen), encoder 290,909,184 (frozen), projector 9,180,160; encoder and decoder"
        assert (frozen in text) == (name == "mobillama_v_align")
    align, whole = found["mobillama_v_align"], found["mobillama_v"]
    layer = 2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024
    encoder = 23 * layer + 2 * 576 * 1024 * 3 * 14**2
    projector = 2 * 576 * (1024 * 2560 + 2560**2)
    assert whole["image"] == pytest.approx(3 * (encoder + projector) / 1e9, abs=0.06)
    assert align["image"] == pytest.approx((encoder + 3 * projector) / 1e9, abs=0.06)
    decoder = 6 * (2_470_822_400 - 32000 * 2560 - 45 * 2560) + 3 * 22 * 2 * 2560 * 2048
    assert whole["token"] == pytest.approx((decoder + 3 * 3 * (encoder + projector) / 2048) / 1e9, abs=0.006)
    # 8 ranks: the gradient of 1 / 8 beside the whole, and an fp32 master of what is frozen too.
    assert align["gradients"] == pytest.approx(9_180_160 * 4 * 9 / 8 / 2**30, abs=0.006)
    assert align["optimizer"] == pytest.approx((1_119_404_544 + 2 * 9_180_160) * 4 / 8 / 2**30, abs=0.006)
    assert whole["optimizer"] == pytest.approx(1_119_404_544 * 12 / 8 / 2**30, abs=0.006)
    # 3 micro-batches of 4 and 2 of 4: a row takes longer where all is trained.
    assert whole["step"] / 2 > 1.3 * align["step"] / 3
