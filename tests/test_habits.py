"""What meets a contributor before the code does: hooks, continuous integration, issue templates, the citation."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_hooks_are_what_make_lint_runs() -> None:
    [own] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert own["repo"] == "local", "versions stand in constraints.txt"
    hooks = {re.sub(r" --force-exclude| -x", "", hook["entry"].removeprefix(".venv/bin/")) for hook in own["hooks"]}
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert hooks == {command.strip() for command in re.findall(r"\$\(BIN\)/(.*)$", recipe, re.MULTILINE)}


def test_the_workflow_runs_what_ci_runs() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["run"]
    assert job["steps"][-1] == {"run": "bash .ci/run"} and (ROOT / ".ci/run").exists()


def test_issue_templates_ask_for_files_that_runs_have() -> None:
    templates = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in templates if path.stem != "config"}
    for name, form in forms.items():
        assert form["name"] and form["description"], name
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert all(field["attributes"]["label"] for field in fields)
    asked = str(forms["run"])
    written = "".join(path.read_text() for path in (ROOT / "megatron_patch/run").glob("*.py"))
    for name in ("status.json", "environment/attempt_N.json", "stacks"):
        assert f"RUN/{name}" in asked and f"RUN/{name}" in written + (ROOT / "docs/operations.md").read_text().replace(
            "runs/NAME/", "RUN/"
        )


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert "2402.16840" in citation["preferred-citation"]["url"] and "2402.16840" in (ROOT / "README.md").read_text()
    assert len(citation["preferred-citation"]["authors"]) == 9
