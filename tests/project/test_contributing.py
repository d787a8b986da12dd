"""CONTRIBUTING.md carried out: its class and its line go into a copy of the project, and the command line has it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, run_python
from given_predictions import arrays, write

import ensemble_orchestrator

PAGE = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CLASS, LINE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MODULE = re.search(r"\[(utils/\w+\.py)\]\(\1\), above the\s+tables", PAGE)[1]
METHOD = re.search(r'"(\w+)"', LINE)[1]
ENSEMBLE = f"{METHOD}_ensemble"
TABLE = "COMBINERS: dict[str, type[Combiner]] = {\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project in which a reader has done what the page says."""
    copy = tmp_path_factory.mktemp("contribution") / "project"
    for folder in ("BASE-BACK", "configs", "tests", "utils"):
        shutil.copytree(PROJECT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("ensemble_orchestrator.py", "pyproject.toml"):
        shutil.copy(PROJECT / file, copy / file)
    module = copy / MODULE
    text = module.read_text(encoding="utf-8")
    assert text.count(TABLE) == 1
    above = text.index("SAVED_AS: ")
    assert above < text.index(TABLE)
    text = f"{text[:above]}{CLASS}\n\n{text[above:]}".replace(TABLE, TABLE + LINE)
    module.write_text(text, encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def type_in(project, tmp_path_factory):
    """Type a command of the copy in a workspace of its own, which has imported predictions."""
    workspace = tmp_path_factory.mktemp("workspace")

    def run(*words: str):
        options = ("--config", "configs/votes.yaml", "--workspace", str(workspace))
        methods = ("--set", f"runs.score_ensemble.methods=[soft_voting,{METHOD}]")
        return run_python("ensemble_orchestrator.py", *words, *options, *methods, cwd=project)

    done = run("import-predictions", "--from", str(write(workspace / "given")))
    assert done.returncode == 0, done.stderr
    run.workspace = workspace
    return run


def test_one_class_and_one_line_are_built_scored_and_kept(type_in):
    for command in ("build-ensemble", "evaluate"):
        done = type_in(command)
        assert done.returncode == 0, done.stderr
        assert ENSEMBLE in done.stdout
    record = json.loads((type_in.workspace / f"ensembles/models/{ENSEMBLE}/ensemble.json").read_text())
    assert record["method"] == METHOD
    metrics = json.loads((type_in.workspace / f"metrics_output/ensembles/{ENSEMBLE}/metrics.json").read_text())
    assert metrics["log_loss"] == pytest.approx(_log_loss(), rel=1e-6)
    again = type_in("build-ensemble")
    assert re.search(rf"{ENSEMBLE} +up to date", again.stdout)


def _log_loss() -> float:
    """That of the page's formula on the test rows, in nats."""
    given = [arrays("test", seed) for seed in (1, 2, 3)]
    members = [np.exp(own["logits"]) / np.exp(own["logits"]).sum(axis=1, keepdims=True) for own in given]
    roots = np.sqrt((np.array(members) ** 2).mean(axis=0))
    labels = given[0]["labels"]
    return float(-np.log((roots / roots.sum(axis=1, keepdims=True))[np.arange(len(labels)), labels]).mean())


@pytest.mark.skipif("export" not in ensemble_orchestrator.COMMANDS, reason="this version has no command export")
def test_it_is_exported(type_in):
    assert type_in("build-ensemble").returncode == 0
    on = ("--set", "exports.enable=true", "--set", "exports.formats=[torchscript]")
    done = type_in("export", "--model-name", ENSEMBLE, *on)
    assert done.returncode == 0, done.stderr
    status = json.loads((type_in.workspace / f"deployment_models/{ENSEMBLE}/export_status.json").read_text())
    assert status["torchscript"]["status"] == "ok"


def test_the_battery_finds_it(project):
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/combiners/test_combiner_battery.py", "-k", METHOD)
    done = run_python(*words, cwd=project)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b1[0-9] passed", done.stdout), done.stdout


def test_what_the_page_says_to_type_exists():
    block = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1]
    orchestrator, battery = block.splitlines()
    parsed = ensemble_orchestrator.build_parser().parse_args(orchestrator.split()[2:])
    assert METHOD in parsed.set[0]
    assert (PROJECT / battery.split()[3]).is_file()
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (PROJECT / target).exists(), target
