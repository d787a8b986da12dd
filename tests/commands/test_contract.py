"""docs/contract.md, read as tables: every command takes the options, leaves the files and prints the keys there."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import PROJECT
from embedded_members import embedded
from evaluated_workspaces import write_workspace
from given_predictions import write
from in_process import run

import ensemble_orchestrator as o
from utils import commands
from utils.core import errors
from utils.core.config import Config
from utils.core.config_sections import Section
from utils.inference import output_files

pytestmark = pytest.mark.usefixtures("few_fits")

PAGE = (PROJECT / "docs" / "contract.md").read_text()
SMALL = (
    *("--set", "runs.score_ensemble.methods=[soft_voting,weighted]", "--set", "runs.model_soup.enable=false"),
    *(
        "--set",
        "pruning.enable=false",
        "--set",
        "runs.stacking.meta_learners=[lr]",
        "--set",
        "runs.fusion.fusion_methods=[concat_mlp]",
    ),
    *("--set", "runs.fusion.fusion_config.epochs=2", "--set", "runs.fusion.fusion_config.hidden_dims=[4]"),
    *("--set", "runs.fusion.train_embeddings=val", "--set", "runs.meta_fuser.mlp_config.epochs=2"),
    *("--set", "runs.meta_fuser.mlp_config.hidden_dims=[4]"),
    *("--set", "runs.cascade.enable=true"),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,stacking_lr]", "--set", "runs.meta_fuser.fuser_type=mlp"),
    *("--set", "distillation.enable=false", "--set", "exports.enable=false", "--quiet"),
)
LINES = {
    "import-predictions": ("import-predictions", "--from", "{given}"),
    "discover": ("discover",),
    "build-ensemble": ("build-ensemble",),
    "stack": ("stack",),
    "fusion-train": ("fusion-train",),
    "meta-fuse": ("meta-fuse",),
    "evaluate": ("evaluate",),
    "pipeline": ("pipeline",),
    "status": ("status",),
    "clean": ("clean",),
    "config": ("config",),
}
"""In this order each finds what it needs; what needs images has a workspace of its own."""
WITH_IMAGES = {
    "predict": ("predict", "--model-name", "soft_voting_ensemble", "{images}"),
    "export": ("export", "--model-name", "soft_voting_ensemble", "--formats", "state_dict"),
    "distill": ("distill",),
    "audit": ("audit",),
}
TAUGHT = (
    *("--set", "distillation.teacher=soft_voting_ensemble", "--set", "distillation.student=CustomConvNeXt"),
    *("--set", "distillation.epochs=1", "--set", "distillation.enable=true", "--set", "exports.enable=true"),
)


def table(title: str) -> dict[str, list[str]]:
    """{first cell: the others} of the table under a title; a cell in backquotes loses them."""
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def words(cell: str) -> set[str]:
    """What stands in backquotes, one by one."""
    return {word for quoted in re.findall(r"`([^`]+)`", cell) for word in quoted.split(", ")}


COMMANDS = table("Commands")


@pytest.fixture(scope="module")
def run_all(tmp_path_factory) -> tuple[Path, dict]:
    """A workspace of imported members after every command, and what each printed."""
    folder = tmp_path_factory.mktemp("contract")
    write(folder / "given", change=embedded(per_fold=False))
    (folder / "w").mkdir()
    found = {}
    for name, line in LINES.items():
        typed = [word.replace("{given}", str(folder / "given")) for word in line]
        before = {path for path in (folder / "w").rglob("*") if path.is_file()}
        done = run(*typed, "--json", *SMALL, workspace=folder / "w")
        found[name] = (done, {path for path in (folder / "w").rglob("*") if path.is_file()} - before)
    return folder / "w", found


def test_every_command_has_a_row():
    assert set(COMMANDS) == set(commands.COMMANDS), (
        "docs/contract.md, the table of commands: add a row, or take one away"
    )


def test_every_command_is_run():
    elsewhere = {"debug", "compare", "demo", "completion"}  # below; tests/project/test_wheel.py, test_completion.py
    assert {*LINES, *WITH_IMAGES, *elsewhere} == set(commands.COMMANDS)


def test_options_are_those_of_the_program():
    found = {
        name: {option for option, how in command.arguments.items() if how.get("help") is not argparse.SUPPRESS}
        for name, command in commands.COMMANDS.items()
    }
    stated = {name: words(cells[0]) for name, cells in table("Options").items()}
    assert stated == found | {"all": set(commands.COMMON_OPTIONS)}, "docs/contract.md, the table of options"


def keys_of(section: type[Section]) -> set[str]:
    """Dotted keys of a section of the configuration."""
    found = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= {f"{name}.{key}" for key in keys_of(kind)}
        else:
            found.add(name)
    return found


def test_keys_of_the_configuration_are_those_of_the_model():
    stated = {
        f"{place}.{key}".removeprefix("top.")
        for place, cells in table("Configuration").items()
        for key in words(cells[0])
    }
    assert stated == keys_of(Config), "docs/contract.md, the table of the configuration"


@pytest.mark.parametrize("command", LINES)
def test_a_command_keeps_to_its_row(command, run_all):
    workspace, found = run_all
    done, new = found[command]
    assert done.code == 0, done.stderr
    check(command, done, new, workspace)


@pytest.mark.parametrize("command", WITH_IMAGES)
def test_a_command_that_needs_images_keeps_to_its_row(command, own_copy):
    before = {path for path in own_copy.rglob("*") if path.is_file()}
    line = [word.replace("{images}", str(own_copy / "split_dataset" / "test" / "2")) for word in WITH_IMAGES[command]]
    done = run(*line, "--config", "configs/votes.yaml", "--json", "--quiet", *TAUGHT, workspace=own_copy)
    assert done.code == 0, done.stderr
    check(command, done, {path for path in own_copy.rglob("*") if path.is_file()} - before, own_copy)
    if command == "predict":
        columns = words(PAGE.split("records, in the file or under `images`")[1].replace("{", "").replace("}", ""))
        assert done.document["images"][0].keys() == set(output_files.COLUMNS) <= columns
        done = run(*line, *("--to", str(own_copy / "a.csv")), "--json", "--quiet", workspace=own_copy)
        assert done.document.keys() - {"failures"} == {"model", "file", "images", "answered", "unreadable"}


def check(command: str, done, new: set[Path], workspace: Path) -> None:
    """What a run printed and left is what the page says of its command."""
    document = json.loads(done.stdout)  # one document and nothing else on stdout
    files, keys = COMMANDS[command]
    assert done.stdout.count("\n") == 1
    assert document["failures"] == []
    expected = words(keys) if words(keys) else {name for name, _, _ in commands.PIPELINE_STAGES} & document.keys()
    assert document.keys() - {"failures", "next"} == expected
    for pattern in words(files):
        assert list(workspace.glob(pattern)), pattern
    if files.startswith("nothing"):
        assert {path for path in new if "debug_logs" not in path.parts} == set()


def test_compare_keeps_to_its_row(tmp_path):
    scores = {"C4.5": 0.8, "C4.5+m+cf": 0.9}
    folders = [write_workspace(tmp_path / str(number), scores) for number in range(6)]
    done = run("compare", *folders, "--to", str(tmp_path / "to"), "--json", "--quiet")
    files, keys = COMMANDS["compare"]
    assert done.document.keys() - {"failures"} == words(keys)
    assert {path.suffix for path in (tmp_path / "to").glob("comparison.*")} <= words(files) | {".json", ".pdf"}
    inside = words(PAGE.split("`compare` reads `ranking.json`")[1].split("\n\n")[0])
    for part in ("methods", "pairs"):
        assert done.document[part][0].keys() <= inside


def test_debug_keeps_to_its_row(synthetic, tmp_path):
    shutil.copytree(synthetic, tmp_path / "debug_tmp" / "synthetic")
    done = run("debug", "--section", "discover", "--fast", "--json", "--quiet", workspace=tmp_path)
    assert done.code == 0, done.stderr
    assert done.document.keys() - {"failures"} == words(COMMANDS["debug"][1])
    assert json.loads((tmp_path / "debug_tmp" / "report.json").read_text()).keys() == words(COMMANDS["debug"][1])
    for options, printed in (
        (("--dry-run", "--section", "stack"), {"sandbox", "dry_run", "sections"}),
        (("--section", "reset", "--confirm"), {"removed", "bytes", "folder"}),
    ):
        done = run("debug", *options, "--json", "--quiet", workspace=tmp_path)
        assert done.document.keys() - {"failures"} == printed


def test_exit_codes_are_those_of_the_program():
    stated = {
        int(code): cells[1].strip("`") for code, cells in table("Exit codes").items() if code.isdigit() and cells[1]
    }
    for code, name in stated.items():
        kind = KeyboardInterrupt if name == "KeyboardInterrupt" else getattr(errors, name)
        assert o.exit_code(kind("x")) == code
    assert set(map(int, table("Exit codes"))) == {0, o.BUG, 143, *o.EXIT_CODES.values()}


@pytest.mark.parametrize("pattern", table("Records"))
def test_records_hold_the_keys_of_the_page(pattern, run_all):
    workspace, _ = run_all
    files = [path for path in workspace.glob(pattern) if path.parent.name != "members"]
    assert files
    for path in files:
        assert words(table("Records")[pattern][0]) <= json.loads(path.read_text()).keys(), path


@pytest.mark.parametrize("name", ["metrics.json", "ranking.json"])
def test_what_evaluate_writes_holds_no_key_that_the_page_lacks(name, run_all):
    workspace, _ = run_all
    stated = next(words(cells[0]) for pattern, cells in table("Records").items() if pattern.endswith(name))
    found = [json.loads(path.read_text()).keys() for path in (workspace / "metrics_output").rglob(name)]
    assert len(found) > (5 if name == "metrics.json" else 0)
    sometimes = table("Inside metrics.json").keys() - stated if name == "metrics.json" else set()
    assert set().union(*found) - sometimes == stated
