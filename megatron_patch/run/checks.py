"""The checks of nodes that `check` and slurm/preflight.sbatch left, as `status` lists them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from megatron_patch import launch

MOST = 10  # listed; older ones are on disk
_LONGEST = 1800.0  # seconds after which slurm/launch.sh no longer waits for a verdict


def lines(runs: Path, logs: Path) -> list[str]:
    """A table of the newest checks, oldest first: RUN/check/* below `runs`, preflight/* below `logs`."""
    patterns = (runs.glob("*/check/*"), (logs / "preflight").glob("*"))
    begun = [(folder.stat().st_mtime, folder) for pattern in patterns for folder in _readable(pattern)]
    if not begun:
        return []
    table = [f"{'check':<40} {'as of':<19} {'healthy':>9}  unhealthy nodes"]
    return table + [_row(folder, when) for when, folder in sorted(begun)[-MOST:]]


def _readable(found: Iterator[Path]) -> Iterator[Path]:
    """Folders that this user may look into; another's end no listing."""
    while True:
        try:
            folder = next(found)
            if folder.is_dir():
                yield folder
        except StopIteration:
            return
        except OSError:
            continue


def _row(folder: Path, when: float) -> str:
    try:
        verdict = launch.read_json(folder / "verdict.json")
    except OSError as error:
        return f"{folder!s:<40} unreadable: {error.strerror}"
    good, bad = verdict.get("good"), verdict.get("bad")
    if isinstance(good, list) and isinstance(bad, dict):
        healthy, unhealthy = f"{len(good)}/{len(good) + len(bad)}", ", ".join(sorted(map(str, bad))) or "-"
    elif (folder / "verdict.json").exists():
        healthy, unhealthy = "damaged", "-"
    else:
        healthy, unhealthy = "running" if time.time() - when < _LONGEST else "none", "-"
    return f"{folder!s:<40} {datetime.fromtimestamp(when):%F %T} {healthy:>9}  {unhealthy}"
