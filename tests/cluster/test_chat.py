"""The chat template tunes a run's checkpoint on the site's conversations, as typed in docs/operations.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from site_folder import REPOSITORY, Site
from slurm_cluster import Cluster

ROW_LENGTH = 129
PREPARE = """
import json, random, sys
from pathlib import Path
from tests.convert.samples import train_tokenizer
folder, draw = Path(sys.argv[1]), random.Random(0)
train_tokenizer(folder)
asked = [{"instruction": f"{draw.choice(['fox', 'dog'])} {draw.randrange(10**6)}?", "output": "dog"} for _ in range(90)]
(folder / "in.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in asked))
"""


def conversations(folder: Path) -> Path:
    folder.mkdir()
    subprocess.run([sys.executable, "-c", PREPARE, folder], cwd=REPOSITORY, check=True)
    build = [sys.executable, "data_tools/build_chat.py", "build", "--input", folder / "in.jsonl"]
    more = ["--output", folder / "data", "--tokenizer", folder / "tokenizer.model", "--row-length", str(ROW_LENGTH)]
    subprocess.run([*build, *more, "--held-out-rows", "6"], cwd=REPOSITORY, check=True)
    return folder / "data"


def test_chat_follows_pretraining(cluster: Cluster, scratch: Path, data: Path) -> None:
    chat = conversations(scratch / "conversations")
    edits = {
        "SITE_DATA=$SITE_REPOSITORY/data/amber ": f"SITE_DATA={data} ",
        "SITE_CHAT_DATA=$SITE_REPOSITORY/data/chat ": f"SITE_CHAT_DATA={chat} ",
        "SITE_PREFLIGHT=yes": "SITE_PREFLIGHT=no",
    }
    site = Site(cluster, scratch / "chat", steps=20, edits=edits)
    site.finish(site.submit("pretrain_05b.sbatch", "--nodes=1"))
    weights = f"run.initial_weights={site.run_folder()}/checkpoints/step_00000020"
    tuned = (f"model.sequence_length={ROW_LENGTH - 1}", "data.reset_at_starts=true", "data.epochs=2", "run.steps=null")
    more = ("data.held_out_interval=5", "data.held_out_rows=6", "optimizer.learning_rate=1e-2")
    output = site.finish(site.submit("chat_05b.sbatch", "--nodes=1", arguments=(weights, *tuned, *more)))
    assert "step 0  held-out loss" in output, "the weights it starts from"
    run = site.run_folder("mobillama_05b_chat")
    used = yaml.safe_load((run / "recipe.yaml").read_text())
    assert used["data"]["folder"] == str(chat) and used["data"]["epochs"] == 2
    talk = [sys.executable, "-m", "megatron_patch", "chat", run]
    told = subprocess.run(talk, cwd=REPOSITORY, check=True, capture_output=True, text=True, input="fox 7?\n")
    assert told.stdout.strip()
