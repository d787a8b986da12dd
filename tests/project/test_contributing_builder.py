"""The builder of CONTRIBUTING.md carried out in a copy of the project: built, kept, known to `status`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import PROJECT, run_python
from given_predictions import write

PAGE = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Add a builder")[2].partition("\n## ")[0]
MODULE, SETTINGS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
KEY, ENTRY = (re.search(rf"`({start}[^`]*)`", SECTION)[1] for start in ("oof_voting: ", r"\w+Builder\(\),"))
PATH = re.search(r"`(utils/building/\w+\.py)`:", SECTION)[1]
CLASS = re.search(r"class (\w+)\(Builder\)", MODULE)[1]
NAME = "oof_voting"
ON = ("--set", "runs.oof_voting.enable=true")


def insert(path: Path, before: str, text: str) -> None:
    content = path.read_text(encoding="utf-8")
    assert content.count(before) == 1, before
    path.write_text(content.replace(before, text + before), encoding="utf-8")


@pytest.fixture(scope="module")
def type_in(tmp_path_factory):
    """Type a command of a copy of the project that has the builder, in a workspace of imported predictions."""
    copy = tmp_path_factory.mktemp("contribution") / "project"
    for folder in ("BASE-BACK", "configs", "utils"):
        shutil.copytree(PROJECT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("ensemble_orchestrator.py", "pyproject.toml"):
        shutil.copy(PROJECT / file, copy / file)
    (copy / PATH).write_text(MODULE, encoding="utf-8")
    insert(copy / "utils/core/config_sections.py", "class Runs(Section):\n", SETTINGS + "\n\n")
    insert(copy / "utils/core/config_sections.py", "    score_ensemble: ScoreEnsemble = Field(\n", f"    {KEY}\n")
    commands = copy / "utils/building/build_commands.py"
    insert(commands, "        PruningBuilder(),\n", f"        {ENTRY}\n")
    insert(
        commands, "from utils.building.builder_protocol import", f"from {PATH[:-3].replace('/', '.')} import {CLASS}\n"
    )
    workspace = tmp_path_factory.mktemp("workspace")

    def run(*words: str):
        options = ("--config", "configs/votes.yaml", "--workspace", str(workspace))
        return run_python("ensemble_orchestrator.py", *words, *options, cwd=copy)

    done = run("import-predictions", "--from", str(write(workspace / "given")))
    assert done.returncode == 0, done.stderr
    return run


def test_the_builder_of_the_page_builds_keeps_and_is_known_to_status(type_in):
    before = type_in("status", *ON, "--json")
    assert before.returncode == 0, before.stderr
    before = json.loads(before.stdout)
    assert before["ensembles"][NAME]["state"] == "missing"
    built = type_in("build-ensemble", *ON, "--json")
    assert built.returncode == 0, built.stderr
    assert NAME in json.loads(built.stdout)["built"]
    assert NAME in json.loads(type_in("build-ensemble", *ON, "--json").stdout)["up_to_date"]
    after = json.loads(type_in("status", *ON, "--json").stdout)
    assert after["ensembles"][NAME]["state"] == "current"
    reseeded = json.loads(type_in("status", *ON, "--set", "seed=7", "--json").stdout)
    assert reseeded["ensembles"][NAME]["state"] == "stale"
    assert reseeded["next"].split()[2] == "build-ensemble"


def test_without_its_section_it_is_not_requested(type_in):
    assert NAME not in json.loads(type_in("build-ensemble", "--json").stdout)["built"]
