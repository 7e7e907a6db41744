"""Both templates of a model that sees, one after the other, as typed in docs/operations.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from site_folder import REPOSITORY, Site
from slurm_cluster import Cluster

ROW_LENGTH = 97
VISION = (
    "model.vision={image_size: 8, patch_size: 4, fit: pad, hidden_size: 16, ffn_hidden_size: 32, num_layers: 2,"
    " num_attention_heads: 2, norm_epsilon: 1e-5, activation: quick_gelu, pixel_shuffle: 1, placeholder_id: 1}"
)
PREPARE = """
import json, sys
from pathlib import Path
from tests.convert.samples import train_tokenizer
from tests.data_tools.vision.pictures import encoded, photograph
folder = Path(sys.argv[1])
train_tokenizer(folder)
(folder / "images").mkdir()
entries = []
for number in range(60):
    (folder / f"images/{number}.png").write_bytes(encoded(photograph(12, 12, number), "png"))
    turns = [{"from": "human", "value": f"<image>\\nfox {number}?"}, {"from": "gpt", "value": "dog"}]
    entries.append({"image": f"{number}.png", "conversations": turns})
(folder / "in.json").write_text(json.dumps(entries))
"""


def images(folder: Path) -> Path:
    folder.mkdir()
    subprocess.run([sys.executable, "-c", PREPARE, folder], cwd=REPOSITORY, check=True)
    build = [
        sys.executable,
        "data_tools/build_vision.py",
        "build",
        "--input",
        folder / "in.json",
        "--image-tokens",
        "4",
    ]
    more = ["--images", folder / "images", "--output", folder / "data", "--tokenizer", folder / "tokenizer.model"]
    shape = ["--row-length", str(ROW_LENGTH), "--held-out-rows", "3", "--workers", "1"]
    subprocess.run([*build, *more, *shape], cwd=REPOSITORY, check=True)
    return folder / "data"


def test_the_second_stage_goes_on_from_the_first(cluster: Cluster, scratch: Path) -> None:
    data = images(scratch / "images")
    (scratch / "vision_align").symlink_to(data)
    edits = {
        "SITE_ALIGN_DATA=$SITE_REPOSITORY/data/vision_align ": f"SITE_ALIGN_DATA={scratch}/vision_align ",
        "SITE_VISION_DATA=$SITE_REPOSITORY/data/vision ": f"SITE_VISION_DATA={data} ",
        "SITE_PREFLIGHT=yes": "SITE_PREFLIGHT=no",
    }
    site = Site(cluster, scratch / "vision", steps=4, edits=edits)
    shape = (VISION, f"model.sequence_length={ROW_LENGTH - 1}", "data.reset_at_starts=true", "data.epochs=4")
    site.finish(
        site.submit("vision_align.sbatch", "--nodes=1", arguments=(*shape, "optimizer.frozen=[encoder,decoder]"))
    )
    weights = f"run.initial_weights={site.run_folder('mobillama_v_align')}/checkpoints/step_00000004"
    output = site.finish(site.submit("vision.sbatch", "--nodes=1", arguments=(*shape, weights)))
    assert f"step 0 has the weights of {weights.removeprefix('run.initial_weights=')}" in output
    used = {
        name: yaml.safe_load((site.run_folder(name) / "recipe.yaml").read_text())["data"]["folder"]
        for name in ("mobillama_v_align", "mobillama_v")
    }
    assert used == {"mobillama_v_align": f"{scratch}/vision_align", "mobillama_v": str(data)}
