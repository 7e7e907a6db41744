"""Every template is accepted as it stands, from any folder, and its nodes come in the order of the switches."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from site_folder import REPOSITORY
from slurm_cluster import Cluster

TEMPLATES = sorted(p.name for p in (REPOSITORY / "slurm").glob("*.sbatch"))


def test_there_is_a_template_for_every_job() -> None:
    assert TEMPLATES == [
        "build_amber.sbatch",
        "chat_05b.sbatch",
        "chat_08b.sbatch",
        "evaluate.sbatch",
        "preflight.sbatch",
        "pretrain_05b.sbatch",
        "pretrain_08b.sbatch",
        "pretrain_baseline1.sbatch",
        "pretrain_baseline2.sbatch",
        "pretrain_large_base.sbatch",
        "smoke.sbatch",
        "vision.sbatch",
        "vision_align.sbatch",
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_slurm_accepts_the_template(cluster: Cluster, template: str) -> None:
    answer = cluster.command("sbatch", "--test-only", REPOSITORY / "slurm" / template)
    nodes = {"pretrain": 19, "preflight": 20, "smoke": 2}.get(template.split("_")[0].split(".")[0], 1)
    assert "to start at" in answer
    assert f"using {128 * 20 if nodes == 19 else 128 * nodes} processors" in answer or nodes == 1, answer


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_outlives_its_time_limit_is_warned_and_put_back(template: str) -> None:
    text = (REPOSITORY / "slurm" / template).read_text()
    long = 'launch.sh" train' in text or 'launch.sh" evaluate' in text
    warned = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    assert (warned is not None and int(warned[1]) >= 60) == long
    assert "\n#SBATCH --open-mode=append\n" in text
    assert ("\n#SBATCH --requeue\n" in text) == (template != "preflight.sbatch")


def test_slurm_refuses_what_this_cluster_has_not(cluster: Cluster) -> None:
    """The check above can fail."""
    with pytest.raises(AssertionError, match="exit 1"):
        cluster.command("sbatch", "--test-only", "--nodes=21", REPOSITORY / "slurm/pretrain_05b.sbatch")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_site_sh_finds_the_repository_from_any_shell(shell: str, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/site.sh").write_text((REPOSITORY / "slurm/site.sh").read_text())
    script = 'cd() { builtin cd "$@" && ls; }; . slurm/site.sh && echo "$SBATCH_OUTPUT"'
    done = subprocess.run([shell, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/logs/%x-%j.out\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_variable_that_would_override_every_template_is_refused(shell: str, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/site.sh").write_text((REPOSITORY / "slurm/site.sh").read_text())
    script = '. slurm/site.sh; export "$1=$2"; sbatch slurm/preflight.sbatch; echo "exit $?"'
    for name, value in (("TIMELIMIT", "1-0"), ("SIGNAL", "TERM@60"), ("NO_REQUEUE", ""), ("OPEN_MODE", "truncate")):
        command = [shell, "-c", script, "x", f"SBATCH_{name}", value]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        assert done.stderr.startswith(f"SBATCH_{name} is set in this shell") and done.stdout == "exit 2\n"
    # Others are a site's own, and Slurm is asked, which is not there.
    done = subprocess.run([shell, "-c", script, "x", "SBATCH_QOS", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.startswith("sbatch: error: ") and done.stdout == "exit 1\n"


def test_scripts_pass_shellcheck() -> None:
    scripts = [p for p in (REPOSITORY / "slurm").iterdir() if p.suffix in (".sh", ".sbatch")]
    scripts += [REPOSITORY / "tests/cluster" / name for name in ("run", "install.sh")]
    subprocess.run([Path(sys.executable).parent / "shellcheck", "-x", *scripts], cwd=REPOSITORY, check=True)
