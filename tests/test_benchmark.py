"""The GPU benchmark's own parts, on a CPU: its clock, its attribution of time, its table. Speeds are never asserted."""

import multiprocessing
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, measure
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_shard, toy_trainer


def test_an_outer_limit_survives_an_inner_one():
    with pytest.raises(measure.TimeIsUp, match="after 1 s"), measure.time_limit(1):
        with pytest.raises(measure.TimeIsUp, match="after 0 s"), measure.time_limit(0.05):
            time.sleep(5)
        time.sleep(5)
    with measure.time_limit(0.05):
        pass
    time.sleep(0.1)  # the alarm is off


def test_an_outer_limit_cuts_an_inner_one():
    with pytest.raises(measure.TimeIsUp, match="after 0 s"), measure.time_limit(0.05), measure.time_limit(60):
        time.sleep(5)


def parts_of_a_step() -> dict[str, float]:
    # Sizes that no other matrix has: FFN 48 and 96, vocabulary 64, tokens 8 x 20.
    trainer = toy_trainer(toy_recipe("batch.micro_batch_size=8", "model.sequence_length=20", "model.num_ffns=1"))
    shard = toy_shard(trainer, 0)
    trainer.step(shard, 1e-4)
    for method in ("clear_gradients", "reduce_gradients", "local_norm_squared", "step"):
        setattr(trainer.optimizer, method, gpu._ranged(getattr(trainer.optimizer, method)))
    return measure.breakdown(lambda: trainer.step(shard, 1e-4), trainer.recipe.model)[0]


def test_every_part_of_a_step_is_seen():
    parts = run_ranks(1, parts_of_a_step)[0]
    assert set(parts) == {*measure.PARTS, "busy"}
    assert all(parts[part] > 0 for part in measure.PARTS), parts
    assert sum(parts[part] for part in measure.PARTS) == pytest.approx(parts["busy"])


class Event:
    def __init__(self, name, shapes=(), parent=None, kernels=()):
        self.name, self.input_shapes, self.cpu_parent, self.kernels = name, shapes, parent, kernels


@pytest.mark.parametrize(
    ("event", "kernel", "part"),
    [
        (Event("aten::mm", [[4096, 2048], [2048, 11264]]), "nvjet_tst", "FFN GEMMs"),
        (Event("aten::addmm", [[2048, 5632], [2048, 4096], [4096, 5632]]), "sm90_xmma_gemm", "FFN GEMMs"),
        (Event("aten::mm", [[4096, 2048], [2048, 6144]]), "nvjet_tst", "projections"),
        (Event("aten::mm", [[4096, 2048], [2048, 32000]]), "nvjet_tst", "logits and loss"),
        (Event("_LinearCrossEntropy"), "_row_statistics", "logits and loss"),
        (Event("_LinearCrossEntropy"), "_to_logits_gradient", "logits and loss"),
        (Event("aten::_cudnn_attention_backward"), "cudnn_generated_fort_native_sdpa", "attention"),
        (Event("SwiGLUBackward"), "_backward", "norms and element-wise"),
        (Event("aten::_fused_adamw_"), "multi_tensor_apply_kernel", "optimizer and gradients"),
        (Event("aten::mul_", [], Event("optimizer")), "vectorized_elementwise", "optimizer and gradients"),
    ],
)
def test_parts(event, kernel, part):
    model = toy_recipe("model.hidden_size=2048", "model.ffn_hidden_size=5632", "model.vocab_size=32000").model
    assert measure.part_of(event, kernel, model) == part


def test_a_kernel_is_counted_once_and_the_longest_come_first():
    model = toy_recipe("model.hidden_size=2048", "model.ffn_hidden_size=5632", "model.vocab_size=32000").model
    gemm, flash = SimpleNamespace(name="nvjet_tst", duration=3e6), SimpleNamespace(name="flash_bwd", duration=7e6)
    ranged = SimpleNamespace(name="optimizer", duration=9e6)
    events = [
        Event("aten::mm", [[4096, 2048], [2048, 11264]], kernels=[gemm]),
        Event("aten::mm", [[4096, 2048], [2048, 11264]], kernels=[gemm]),
        Event("aten::_flash_attention_backward", kernels=[flash]),
        Event("Command Buffer Full", kernels=[gemm, flash]),  # the profiler's own: what operators launched, again
        Event("optimizer", kernels=[ranged]),
    ]
    parts, longest = measure.device_time(events, model)
    assert (parts["FFN GEMMs"], parts["attention"], parts["busy"]) == (6.0, 7.0, 13.0)
    assert [(k["kernel"], k["calls"], k["seconds"]) for k in longest] == [("flash_bwd", 1, 7.0), ("nvjet_tst", 2, 6.0)]


def test_the_revision_that_is_named_is_the_one_that_is_recorded(monkeypatch):
    monkeypatch.setenv("COMMIT", "1234567")
    assert measure.commit() == "1234567"


def test_table_holds_every_case_and_only_the_ratios_that_were_measured(tmp_path):
    benchmark = gpu.Benchmark(tmp_path, minutes=1, small=True)
    benchmark.results["ceilings"] = {"matmul_flops": 1e12, "copy_bytes_per_second": 1e12}
    recipe = benchmark.recipe("mobillama_05b")
    benchmark.add_case("mobillama_05b", 1, recipe, 2.0, state_bytes=100, planned_memory=5)
    benchmark.add_case("mobillama_05b", 2, recipe, 1.0, state_bytes=100, planned_memory=5)
    benchmark.add_case("mobillama_05b, run.deterministic=false", 2, recipe, 0.5)
    benchmark.add_case("a peer", 2, recipe, 3.0)
    benchmark.write()
    text = benchmark.file.with_suffix(".md").read_text()
    assert text.count("| mobillama_05b |") == 2
    assert "mobillama_05b / a peer, each at its best micro-batch: 3.00 times" in text
    assert "mobillama_05b, run.deterministic=false / mobillama_05b, each at its best micro-batch: 2.00 times" in text
    assert "mobillama_05b, run.deterministic=false / a peer, each at its best micro-batch: 6.00 times" in text
    assert text.count(" times the tokens/s") == 3
    assert "large_base" not in text


def test_a_failing_case_is_a_note_and_the_next_one_runs(tmp_path):
    benchmark = gpu.Benchmark(tmp_path, minutes=1, small=True)

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert not benchmark.attempt("big", 10, out_of_memory)
    assert not benchmark.attempt("slow", 0.05, lambda: time.sleep(5))
    assert benchmark.attempt("good", 10, lambda: None)
    assert benchmark.results["notes"] == ["big: out of memory", "slow: stopped after 0 s"]


def interrupted(folder, minutes, stdout, in_a_case):
    """`make bench-gpu` with one row measured, in a case that takes a minute and that its time limit cannot stop."""

    def case():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        in_a_case.set()
        time.sleep(60)

    def run(benchmark):
        benchmark.results["ceilings"] = {"matmul_flops": 1e12, "copy_bytes_per_second": 1e12}
        benchmark.add_case("a peer", 2, benchmark.recipe("mobillama_05b"), 3.0)
        benchmark.attempt("a case", 60, case)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell ignores Ctrl-C
    os.dup2(stdout, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - pytest's is another
    sys.argv = ["gpu", "--small", "--out", str(folder), "--minutes", str(minutes)]
    gpu.Benchmark.run, gpu.GRACE, gpu.STARTED = run, 0.1, time.monotonic()
    sys.exit(gpu.main())


@pytest.mark.parametrize(
    ("sent", "minutes", "code"), [(signal.SIGINT, 5, 130), (signal.SIGTERM, 5, 143), (None, 0.01, 1)]
)
def test_the_table_is_printed_whatever_ends_the_benchmark(tmp_path, sent, minutes, code):
    forked = multiprocessing.get_context("fork")
    in_a_case = forked.Event()
    with (tmp_path / "stdout").open("w+") as stdout:
        process = forked.Process(target=interrupted, args=(tmp_path, minutes, stdout.fileno(), in_a_case))
        process.start()
        assert in_a_case.wait(60)
        if sent is not None:
            os.kill(process.pid, sent)
        process.join(60)
        assert process.exitcode == code
        stdout.seek(0)
        said = stdout.read()
    assert "| a peer | 2 |" in said
    (file,) = tmp_path.glob("*.md")
    assert said.endswith(file.read_text() + "\n")
