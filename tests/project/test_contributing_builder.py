"""The builder of CONTRIBUTING.md carried out in a copy of the project: built, kept, known to `status`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import PROJECT
from copied_project import copy_project, typed
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
    """Type commands of a copy of the project that has the builder, in a workspace of imported predictions."""
    copy = copy_project(tmp_path_factory.mktemp("contribution"))
    (copy / PATH).write_text(MODULE, encoding="utf-8")
    insert(copy / "utils/core/config_sections.py", "class Runs(Section):\n", SETTINGS + "\n\n")
    insert(copy / "utils/core/config_sections.py", "    score_ensemble: ScoreEnsemble = Field(\n", f"    {KEY}\n")
    commands = copy / "utils/building/build_commands.py"
    insert(commands, "        PruningBuilder(),\n", f"        {ENTRY}\n")
    insert(
        commands, "from utils.building.builder_protocol import", f"from {PATH[:-3].replace('/', '.')} import {CLASS}\n"
    )
    workspace = tmp_path_factory.mktemp("workspace")

    def run(*lines: tuple[str, ...]):
        options = ("--config", "configs/votes.yaml", "--workspace", str(workspace))
        return typed(copy, *((*words, *options) for words in lines))

    (done,) = run(("import-predictions", "--from", str(write(workspace / "given"))))
    assert done.code == 0, done.stderr
    return run


def test_the_builder_of_the_page_builds_keeps_and_is_known_to_status(type_in):
    status, build = ("status", *ON, "--json"), ("build-ensemble", *ON, "--json")
    before, built, again, after, reseeded = type_in(status, build, build, status, (*status, "--set", "seed=7"))
    assert before.code == 0, before.stderr
    assert before.document["ensembles"][NAME]["state"] == "missing"
    assert built.code == 0, built.stderr
    assert NAME in built.document["built"]
    assert NAME in again.document["up_to_date"]
    assert after.document["ensembles"][NAME]["state"] == "current"
    assert reseeded.document["ensembles"][NAME]["state"] == "stale"
    assert reseeded.document["next"].split()[2] == "build-ensemble"


def test_without_its_section_it_is_not_requested(type_in):
    (done,) = type_in(("build-ensemble", "--json"))
    assert NAME not in done.document["built"]
