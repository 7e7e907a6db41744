"""Energy from a GPU's counter to log, status, report and model card, beside the plan's; where a run parts from it."""

from __future__ import annotations

import ctypes
import json
import math
import re
import subprocess
import time
from pathlib import Path

import pytest

from megatron_patch.__main__ import main
from megatron_patch.convert.model_card import model_card
from megatron_patch.parallel import device, joules
from megatron_patch.run.pace import Pace
from megatron_patch.run.planned import against_plan, measured_energy
from tests.convert.samples import MemoryWeights, small_recipe
from tests.ranks import run_ranks
from tests.train.job import Job, write_data_set

# A driver's library with one GPU, whose counter is 2,500 mJ further at each reading, and has none after the fourth.
DRIVER = """
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **gpu) {
    *gpu = (void *) 0x77;
    return __builtin_strcmp(uuid, "GPU-5eed") ? 6 : 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *gpu, unsigned long long *energy) {
    static int readings;
    *energy = 1000000000000ull + 2500ull * ++readings;
    return gpu != (void *) 0x77 ? 2 : readings > 4 ? 3 : 0;
}
"""


def counted(library: Path | None, uuid: str) -> list[float]:
    """Readings by NVIDIA's own package, of a library that has taken the driver's place."""
    if library is not None:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    device.HAS_GPU = True
    device.uuid = lambda: uuid
    counter = joules.EnergyCounter()
    return [counter.since_last() for _ in range(5)]


def test_a_gpus_counter_is_read_and_nothing_is_where_there_is_none(tmp_path: Path) -> None:
    source, library = tmp_path / "nvml.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text(DRIVER)
    build = ["cc", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(library), str(source)]
    subprocess.run(build, check=True)
    assert run_ranks(1, counted, library, "5eed") == [[2.5, 2.5, 2.5, math.inf, math.inf]]
    assert run_ranks(1, counted, library, "another") == [[math.inf] * 5]
    assert run_ranks(1, counted, None, "5eed") == [[math.inf] * 5], "no driver on this machine"


def draws(rank: int) -> None:
    """Each reading finds 1 kJ more; rank 1 cannot be read from its fourth step on."""
    readings = iter(range(99))

    def read(self: joules.EnergyCounter) -> float:
        number = next(readings)
        return math.inf if rank and number > 4 else 1e3 * number

    joules.EnergyCounter._read = read  # type: ignore[method-assign]


def test_what_all_gpus_draw_is_logged_and_told_beside_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = [f"data.folder={write_data_set(tmp_path / 'data')}", f"run.folder={run}", "run.steps=6"]
    Job(2, [*settings, "checkpoint.interval_minutes=0"], tmp_path / "log", before=draws).run()
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r.get("joules") for r in records if "loss" in r] == [2e3] * 4 + [None] * 2
    on = ["--gpus", "h100", "--nodes", "1", "--gpus-per-node", "2", "--pue", "1.5", "--grid", "0.2"]
    assert main(["plan", str(run / "recipe.yaml"), "--save", *on]) == 0
    planned = json.loads((run / "plan.json").read_text())
    kwh = 8e3 / 3.6e6 * 1.5
    share = kwh / (planned["kwh"] * 4 / 6)
    said = f"{kwh:,.4g} kWh, {kwh * 0.2:,.4g} kg CO2e (PUE 1.5, 0.2 kg CO2e a kWh) drawn by the GPUs in 4 of 6 steps"
    capsys.readouterr()
    assert main(["status", str(run)]) == 0
    told = capsys.readouterr().out
    assert f"\nenergy       {said}; {share:.1%} of the " in told
    assert main(["report", str(run), "--evaluations", str(tmp_path)]) == 0
    assert f"Energy: {said}" in (run / "report.html").read_text()
    upto = measured_energy(run, Pace.of(run / "log.jsonl", 3))
    assert upto is not None and "in 3 of 3 steps" in upto
    card = model_card(MemoryWeights(small_recipe()), "shared", None, upto)
    assert f"| energy of training | {upto} |" in card
    assert "| energy of training | not measured |" in model_card(MemoryWeights(small_recipe()), "shared", None)


def write_log(path: Path, rates: list[float]) -> Path:
    now = time.time()
    lines = [
        {"step": i, "tokens": 8 * i, "loss": 1.0, "seconds": 8 / rate, "tokens_per_second": rate, "time": now + i}
        for i, rate in enumerate(rates, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("repeat", [1, 200], ids=["all of a log", "places of a long one"])
def test_the_step_from_which_on_a_run_is_apart_from_its_plan(repeat: int, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"tokens_per_second": 100.0, "ranks": 2, "hardware": "H"}))

    def told(*parts: tuple[int, float]) -> tuple[str, int | None]:
        log = write_log(tmp_path / "log.jsonl", [rate for steps, rate in parts for _ in range(steps * repeat)])
        text = against_plan(tmp_path, parts[-1][1], 2, Pace.of(log).rates) or ""
        since = re.search(r" since step ([\d,]+)$", text)
        return text, int(since[1].replace(",", "")) if since else None

    slow, since = told((100, 98.0), (4, 5.0), (96, 97.0), (100, 70.0))
    assert "70.0% of it reached, below 90% since step" in slow
    assert since is not None and abs(since - 201 * repeat) <= 16 + 300 * repeat / 100, "a moment's fall is not it"
    assert told((100, 98.0), (100, 95.0))[0].endswith("95.0% of it reached")
    fast, since = told((100, 130.0))
    assert fast.endswith("130.0% of it reached, above 110% since step 1") and since == 1
