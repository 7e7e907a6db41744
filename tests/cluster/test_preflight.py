"""The preflight template on twenty nodes, three of them planted sick in ways that only a real network shows."""

from __future__ import annotations

from pathlib import Path

from site_folder import Site
from slurm_cluster import Cluster


def test_planted_bad_nodes_are_found_and_named(cluster: Cluster, scratch: Path) -> None:
    site = Site(cluster, scratch / "sick_nodes")
    slow, lonely, read_only = "dgx07", "dgx12", "dgx18"
    limit = f"qdisc add dev {cluster.cable(slow)} root tbf rate 500kbit burst 16kb latency 50ms"
    cluster.command("tc", *limit.split())
    for peer in cluster.names:  # it still reaches the controller
        if peer != lonely:
            cluster.on_node(lonely, "ip", "route", "add", "blackhole", cluster.address[peer])
    runs = site.folder / "runs"
    runs.mkdir()
    cluster.on_node(read_only, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(runs))
    alerts = scratch / "alerts"
    local = "    local subject=$1 text=$2\n"
    site.edit(local, f'{local}    echo "$subject: $text" >>{alerts}\n    return 3  # mail is out of order\n')

    job = site.submit("preflight.sbatch")
    output = site.finish(job, timeout=500, expected="FAILED")

    bad = (site.folder / f"logs/preflight/{job}.0/bad").read_text().splitlines()
    assert [line.split(":")[0] for line in bad] == [slow, lonely, read_only], output
    assert "of the median pace" in bad[0]
    assert "Read-only file system" in bad[2]
    assert "site_alert in slurm/site.sh failed with status 3" in output
    assert "fit nodes: 17 of 20" in output
    assert alerts.read_text() == f"bad nodes found by job {job}: " + "\n".join(bad) + "\n"
