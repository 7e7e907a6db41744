"""Which checkpoints there are and which are kept; what a resume refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.evaluate.models import checkpoints_in
from megatron_patch.recipe import load
from megatron_patch.train.cadence import Cadence
from megatron_patch.train.checkpoint import CheckpointError, open_checkpoint, run_folder
from megatron_patch.train.checkpoint.format import Index, read_index, read_marker
from megatron_patch.train.checkpoint.run_folder import RunFolder
from tests.train.checkpoint.compare import history, newest
from tests.train.job import Job, write_data_set


def settings(data_folder: Path, run: Path, *overrides: str) -> list[str]:
    return [
        f"data.folder={data_folder}",
        f"run.folder={run}",
        "run.steps=30",
        "batch.micro_batch_size=8",
        "optimizer.decay_steps=60",
        "checkpoint.interval_steps=4",
        "checkpoint.keep=2",
        "data.held_out_interval=0",
        *overrides,
    ]


@pytest.fixture(scope="module")
def finished(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty steps of 8 rows over segments of 200 rows, a milestone every 10, every second one full."""
    run = tmp_path_factory.mktemp("finished") / "run"
    milestones = ["checkpoint.milestone_steps=10", "checkpoint.full_milestone_every=2"]
    Job(1, settings(data_folder, run, *milestones), run.with_suffix(".log")).run()
    return run


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_the_last_restart_checkpoints_and_every_milestone_are_kept(finished: Path) -> None:
    assert names(finished) == [
        "checkpoints.csv",
        "ckpt_000",
        "ckpt_001",
        "ckpt_002",
        "latest",
        "step_00000028",
        "step_00000030",
    ]
    with open_checkpoint(finished / "checkpoints/ckpt_000") as milestone:
        assert not milestone.is_full
        assert (milestone.step, milestone.samples, milestone.tokens) == (10, 80, 80 * 16)
        with pytest.raises(CheckpointError, match="weights alone"):
            milestone.tensor("ffn.linear_fc1.weight", "exp_avg")
    with open_checkpoint(finished / "checkpoints/ckpt_001") as milestone:
        assert milestone.is_full


def test_the_table_of_milestones(finished: Path) -> None:
    with (finished / "checkpoints/checkpoints.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["name"], r["step"], r["samples"], r["tokens"], r["segments"], r["contents"]) for r in rows] == [
        ("ckpt_000", "10", "80", "1280", "0-0", "weights"),
        ("ckpt_001", "20", "160", "2560", "0-0", "full"),
        ("ckpt_002", "30", "240", "3840", "0-1", "weights"),
    ]
    for row in rows:
        with open_checkpoint(finished / "checkpoints" / row["name"]) as milestone:
            assert row["digest"] == milestone.digest


def test_rows_that_make_no_whole_batch_are_logged(data_folder: Path, tmp_path: Path) -> None:
    """Batches of 72 rows over segments of 200: two a segment, and 56 rows that are in neither."""
    batch = ["batch.global_batch_size=72", "batch.micro_batch_size=72", "run.steps=4", "checkpoint.interval_steps=0"]
    job = Job(1, settings(data_folder, tmp_path / "run", *batch), tmp_path / "log")
    assert "segment 1 is done: 56 of its rows make no whole batch and are left out" in job.run()
    records = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    found = [(r["step"], r["left_out"]) for r in records if "left_out" in r]
    assert [(step, rest["segment"]) for step, rest in found] == [(2, 0), (4, 1)]
    for segment, (_, rest) in enumerate(found):
        order = np.random.RandomState(11111 + segment).permutation(200)
        assert rest["rows"] == order[144:].tolist()


def table(run: Path) -> dict[str, dict[str, str]]:
    """Lines of the table of milestones by name, without the time at which they were written."""
    with (run / "checkpoints/checkpoints.csv").open(newline="") as stream:
        return {row["name"]: {**row, "wall_time": ""} for row in csv.DictReader(stream)}


def test_another_interval_neither_replaces_nor_renumbers_a_milestone(
    finished: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Every 4 steps: ckpt_001, step 20's, would be step 8's. And the last step is a milestone whatever its number."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    said = Job(1, settings(data_folder, run, "checkpoint.milestone_steps=4", "run.steps=33"), tmp_path / "log").run()
    assert (
        "ckpt_000 is the milestone of step 10; every 4 steps (checkpoint.milestone_steps) it would be step 4's" in said
    )
    ours, before = table(run), table(finished)
    assert {name: ours[name] for name in before} == before
    added = {name: (row["step"], row["segments"]) for name, row in ours.items() if name not in before}
    assert added == {"ckpt_step_00000032": ("32", "1-1"), "ckpt_step_00000033": ("33", "1-1")}
    for name, row in ours.items():
        with open_checkpoint(run / "checkpoints" / name) as milestone:
            assert (milestone.digest, milestone.step) == (row["digest"], int(row["step"]))
    # Ended where more steps were planned: the step it stands at is the last one now, and so a milestone.
    (run / "checkpoints/checkpoints.csv").unlink()
    shutil.rmtree(run / "checkpoints/ckpt_step_00000033")
    Job(1, settings(data_folder, run, "checkpoint.milestone_steps=4", "run.steps=33"), tmp_path / "log").run()
    assert table(run) == ours, "lines that a full disk or a kill kept from being written are made up for"


def test_a_milestone_of_other_content_is_kept_beside_the_one_of_its_name(
    finished: Path, data_folder: Path, tmp_path: Path
) -> None:
    """The run goes back to step 20 and passes step 30 again, with another learning rate."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("step_00000028", "step_00000030"):
        shutil.rmtree(run / "checkpoints" / name)
    lines = (run / "checkpoints/checkpoints.csv").read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("ckpt_000,10,", "ckpt_000,12,")
    (run / "checkpoints/checkpoints.csv").write_text("".join(lines[:2]))  # without those of steps 20 and 30
    changed = settings(data_folder, run, "checkpoint.milestone_steps=10", "optimizer.learning_rate=1e-3")
    said = Job(1, changed, tmp_path / "log", accept_changes=True).run()
    for name in ("ckpt_000", "ckpt_001"):
        assert f"checkpoints.csv: the line of {name} was missing or wrong; written" in said
    ours, before = table(run), table(finished)
    assert [ours[name] == before[name] for name in before] == [True, True, False]
    for name, digest in (("ckpt_002.earlier", before["ckpt_002"]["digest"]), ("ckpt_002", ours["ckpt_002"]["digest"])):
        with open_checkpoint(run / "checkpoints" / name) as milestone:
            assert (milestone.step, milestone.digest) == (30, digest)
    assert [p.name for p in checkpoints_in(run)] == ["ckpt_000", "ckpt_001", "ckpt_002"], "those that eval scores"
    folder, marker = (
        RunFolder(load("recipes/demo.yaml", [f"run.folder={run}"])),
        read_marker(run / "checkpoints/ckpt_000"),
    )
    folder.keep_earlier(folder.milestone(0), marker)
    assert folder.milestone(0).is_dir(), "one of the same content is in nobody's way"
    folder.keep_earlier(folder.milestone(2), marker)
    assert {p.name for p in folder.path.glob("ckpt_002*")} == {"ckpt_002.earlier", "ckpt_002.earlier_2"}


def test_a_checkpoint_that_was_moved_and_linked_to_is_read_and_not_deleted(
    finished: Path, data_folder: Path, tmp_path: Path
) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    shutil.copytree(finished, run)
    for name in ("step_00000028", "step_00000030"):
        shutil.move(run / "checkpoints" / name, away / name)
        (run / "checkpoints" / name).symlink_to(away / name)
    (run / "checkpoints/step_00000032").symlink_to(tmp_path / "nowhere")
    said = Job(1, settings(data_folder, run, "run.steps=36"), tmp_path / "log").run()
    assert "step_00000030 at step 30" in said and "deleted step_00000028" in said
    assert names(run)[-2:] == ["step_00000032", "step_00000036"]
    for name in ("step_00000028", "step_00000030"):
        open_checkpoint(away / name).close()


def test_what_stands_in_the_way_is_set_aside_and_said(finished: Path, data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    folder = run / "checkpoints"
    (folder / "step_00000032").write_text("a file")
    (folder / "latest").unlink()
    shutil.copytree(folder / "step_00000030", folder / "latest")
    (folder / "ckpt_000/COMPLETE").unlink()
    marker = folder / "step_00000030/COMPLETE"
    marker.unlink()
    marker.symlink_to("/proc/self/mem")  # reading it is an input/output error
    (folder / "step_00000030.broken").write_text("of an earlier time")
    said = Job(1, settings(data_folder, run, "run.steps=32"), tmp_path / "log").run()
    for line in (
        f"{folder}/step_00000032: is no folder; set aside as step_00000032.broken",
        f"{folder}/latest: is no file; set aside as latest.broken",
        f"{folder}/ckpt_000: its COMPLETE was lost; set aside as ckpt_000.broken",
        f"{marker}: cannot be read (Input/output error); falling back to the checkpoint before",
        "step_00000028 at step 28",
    ):
        assert line in said
    aside = ["ckpt_000.broken", "latest.broken", "step_00000030.broken", "step_00000032.broken"]
    assert [name for name in names(run) if name.endswith(".broken")] == aside
    assert all((folder / name / "index.json").exists() for name in aside[:3])
    assert newest(run).step == 32
    assert history(run).items() >= history(finished).items()


def test_a_marker_that_cannot_be_read_is_no_missing_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    runs = RunFolder(load("recipes/demo.yaml", [f"run.folder={tmp_path / 'run'}"]))
    before = runs.candidates()
    assert [folder.name for folder in before] == ["step_00000030", "step_00000028", "ckpt_001"]
    for folder in before:
        (folder / "COMPLETE").unlink()
        (folder / "COMPLETE").symlink_to("COMPLETE")
    assert runs.sweep() == [] and runs.candidates() == before


def test_a_resume_reads_no_index_that_the_table_vouches_for(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    runs, read = RunFolder(load("recipes/demo.yaml", [f"run.folder={tmp_path / 'run'}"])), list[str]()

    def counted(folder: Path) -> Index:
        read.append(folder.name)
        return read_index(folder)

    monkeypatch.setattr(run_folder, "read_index", counted)

    def found() -> tuple[list[str], list[str]]:
        read.clear()
        return [folder.name for folder in runs.candidates()], sorted(read)

    newest, all_three = ["step_00000030", "step_00000028", "ckpt_001"], ["ckpt_000", "ckpt_001", "ckpt_002"]
    assert found() == (newest, ["ckpt_001"])
    table = runs.path / "checkpoints.csv"
    whole = table.read_text()
    table.write_text(whole.replace("20,160", "40,160"))  # where a full one stands, it says itself
    assert found() == (newest, ["ckpt_001"])
    digest = read_marker(runs.path / "ckpt_001").digest
    table.write_text(whole.replace(f"full,{digest}", f"weights,{digest}"))
    for name in ("step_00000030", "step_00000028"):
        shutil.rmtree(runs.path / name)
    assert found() == (["ckpt_001"], all_three)  # nothing else is there: no table is believed
    table.write_text("".join(line.replace(",weights,", ",weights,0") for line in whole.splitlines(keepends=True)))
    assert found() == (["ckpt_001"], all_three)  # of other content


def test_a_file_in_place_of_the_checkpoints_is_refused(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()
    job = Job(2, settings(data_folder, tmp_path / "run", "batch.micro_batch_size=4"), tmp_path / "log")
    assert job.wait() == [2, 2]
    assert f"refused: {tmp_path}/run/checkpoints: is not a folder" in job.log.read_text()


def test_a_rewound_run_writes_its_milestones_again(finished: Path, data_folder: Path, tmp_path: Path) -> None:
    """With both restart checkpoints broken the full milestone of step 20 is what the run goes on from."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("step_00000028", "step_00000030"):
        (run / "checkpoints" / name / "rank_00000.safetensors").unlink()
    again = settings(data_folder, run, "checkpoint.milestone_steps=10")
    stopped = Job(1, [*again, "run.steps=20"], tmp_path / "log").run()
    assert "ckpt_001 at step 20" in stopped
    assert newest(run).step == 20, "a milestone is no restart checkpoint"
    Job(1, again, tmp_path / "log").run()
    assert history(run) == history(finished)
    with (run / "checkpoints/checkpoints.csv").open() as stream:
        assert [row["step"] for row in csv.DictReader(stream)] == ["10", "20", "30"]
    assert names(run)[-4:] == ["step_00000028", "step_00000028.broken", "step_00000030", "step_00000030.broken"]


def test_a_finished_run_started_again_changes_nothing(finished: Path, data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.stat().st_ino for path in run.glob("checkpoints/*/*")}
    said = Job(1, settings(data_folder, run, "checkpoint.milestone_steps=10"), tmp_path / "log").run()
    assert {path: path.stat().st_ino for path in run.glob("checkpoints/*/*")} == before, "written once more"
    assert "all 30 steps are done already; to go on, set run.steps above 30" in said
    assert names(run) == names(finished) and history(run) == history(finished)
    assert newest(run).digest == newest(finished).digest


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate: 0.0003 -> 0.001"),
        ("seed=5", "seed: 11111 -> 5"),
        ("data.order_seed=7", "data.order_seed: 11111 -> 7"),
        ("model.norm_epsilon=1e-6", "model.norm_epsilon: 1e-05 -> 1e-06"),
    ],
)
def test_another_recipe_is_refused(
    finished: Path, data_folder: Path, tmp_path: Path, override: str, shown: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    job = Job(1, settings(data_folder, run, override), tmp_path / "log")
    assert job.wait() == [2]
    assert shown in job.log.read_text() and "--accept-changes" in job.log.read_text()
    assert names(run) == names(finished) and history(run) == history(finished)


def test_another_end_of_the_cosine_is_refused_however_it_is_written(
    finished: Path, data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for overrides, end in ((["run.steps=null"], 75), (["run.steps=33"], 33)):
        job = Job(1, settings(data_folder, run, "optimizer.decay_steps=null", *overrides), tmp_path / f"{end}.log")
        assert job.wait() == [2]
        shown = f"last step of the learning rate's cosine: 60 -> {end} (optimizer.decay_steps=60 keeps it there)"
        assert shown in job.log.read_text() and "--accept-changes" in job.log.read_text()
    Job(1, settings(data_folder, run, "run.steps=33"), tmp_path / "log").run()
    same = ["optimizer.decay_steps=null", "run.steps=60"]
    Job(1, settings(data_folder, run, *same), tmp_path / "log").run()
    assert newest(run).step == 60 and not newest(run).state.accepted_changes


def test_another_end_of_the_plateau_is_refused_under_its_name(data_folder: Path, tmp_path: Path) -> None:
    wsd = ["optimizer.schedule=wsd", "optimizer.cooldown_steps=1", "optimizer.warmup_steps=1", "run.steps=2"]
    Job(1, settings(data_folder, tmp_path / "run", *wsd), tmp_path / "log").run()
    job = Job(1, settings(data_folder, tmp_path / "run", *wsd, "optimizer.decay_steps=50"), tmp_path / "log")
    assert job.wait() == [2]
    assert "last step of the learning rate's wsd: 60 -> 50 (optimizer.decay_steps=60 keeps" in job.log.read_text()


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (["batch.global_batch_size=4", "batch.micro_batch_size=4"], "batch.global_batch_size was 8, now it is 4"),
        (["model.ffn_hidden_size=64"], "model.ffn_hidden_size: 48 -> 64"),
    ],
)
def test_what_no_flag_makes_possible(
    finished: Path, data_folder: Path, tmp_path: Path, overrides: list[str], shown: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    job = Job(1, settings(data_folder, run, *overrides), tmp_path / "log", accept_changes=True)
    assert job.wait() == [2]
    assert shown in job.log.read_text()


def test_another_data_set_is_refused_unless_accepted_and_that_is_recorded(
    finished: Path, data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    other = write_data_set(tmp_path / "other", seed=1)
    job = Job(1, settings(other, run, "run.steps=32"), tmp_path / "log")
    assert job.wait() == [2]
    with newest(finished) as checkpoint:
        assert f"data set: {checkpoint.data_digest} -> " in job.log.read_text()
    Job(1, settings(other, run, "run.steps=32"), tmp_path / "log", accept_changes=True).run()
    with newest(run) as checkpoint:
        assert checkpoint.step == 32
        assert [change[:9] for change in checkpoint.state.accepted_changes] == ["data set:"]
    moved = tmp_path / "moved"
    shutil.copytree(other, moved)
    said = Job(1, settings(moved, run, "run.steps=33"), tmp_path / "log").run()
    assert "changed since the checkpoint: data.folder" in said, "the content counts, not the path"


def test_cadence() -> None:
    policy = load("recipes/mobillama_05b.yaml").checkpoint
    paper = load("recipes/mobillama_05b.yaml", ["use=paper_milestones"]).checkpoint
    ours = Cadence(policy, steps_per_segment=2133)
    due = [step for step in range(1, 767_881) if ours.milestone(step)]
    assert (due[0], due[-1], len(due)) == (2133, 767_880, 360)
    assert ours.milestone(767_880) == (359, "full")
    assert [ours.milestone(2133 * k)[1] for k in (1, 35, 36, 37)] == ["weights", "weights", "full", "weights"]  # type: ignore[index]
    assert Cadence(paper, 2133).milestone(2000) == (0, "weights")
    assert not any(ours.restart_checkpoint_due(step) for step in range(1, 100)), "by the clock alone"
