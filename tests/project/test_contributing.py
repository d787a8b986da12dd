"""CONTRIBUTING.md carried out: its combiner, setting and metric go into a copy of the project, where they are used."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, run_python
from copied_project import copy_project, typed
from given_predictions import arrays, write

import ensemble_orchestrator
from utils.numeric.metrics import softmax

PAGE = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
KEY, DEFAULT, CLASS, LINE, TEST, METRIC, METRIC_LINE = re.findall(
    r"```python\n(.*?)```", PAGE.partition("## Add a builder")[0], re.DOTALL
)
TEST_FILE = re.search(r"in a new file `([^`]+)`", PAGE)[1]
METHOD = re.search(r'"(\w+)"', LINE)[1]
ENSEMBLE = f"{METHOD}_ensemble"
TRIM = 0.4


def insert(file: Path, text: str, *, before: str) -> None:
    """Put `text` in front of the only place of `before`."""
    content = file.read_text(encoding="utf-8")
    assert content.count(before) == 1, f"{file}: {before!r} occurs {content.count(before)} times"
    file.write_text(content.replace(before, text + before), encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project in which a reader has done what the page says."""
    copy = copy_project(tmp_path_factory.mktemp("contribution"), "docs", "tests")
    insert(copy / "utils/core/config_sections.py", KEY, before="\n\nclass ModelSoup(Section)")
    insert(copy / "tests/core/test_config.py", DEFAULT, before='        "runs.stacking.fit_rows": "honest",\n')
    insert(copy / "utils/ensemble_methods.py", f"{CLASS}\n\n", before="SAVED_AS: ")
    insert(copy / "utils/ensemble_methods.py", LINE, before='    "soft_voting": SoftVoting,\n')
    insert(copy / "utils/numeric/metrics.py", f"{METRIC}\n\n", before="def point_metrics(")
    insert(
        copy / "utils/numeric/metrics.py", METRIC_LINE, before='        "reliability": reliability(scores, truth),\n'
    )
    (copy / TEST_FILE).write_text(TEST, encoding="utf-8")
    contract = copy / "docs/contract.md"
    text, count = re.subn(r"(\| `runs.score_ensemble` \| `[^`]+)`", r"\1, trim`", contract.read_text(encoding="utf-8"))
    assert count == 1
    contract.write_text(text, encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def type_in(project, tmp_path_factory):
    """Type commands of the copy, each with a value of `trim`, in a workspace that has imported predictions."""
    workspace = tmp_path_factory.mktemp("workspace")

    def run(*commands: tuple[str | float, ...]):
        options = ("--config", "configs/votes.yaml", "--workspace", str(workspace))
        methods = ("--set", f"runs.score_ensemble.methods=[soft_voting,{METHOD}]")
        return typed(
            project,
            *((*words, *options, *methods, "--set", f"runs.score_ensemble.trim={trim}") for *words, trim in commands),
        )

    imported, *others = run(
        ("import-predictions", "--from", str(write(workspace / "given")), TRIM),
        ("build-ensemble", TRIM),
        ("evaluate", TRIM),
    )
    assert imported.code == 0, imported.stderr
    for done in others:
        assert done.code == 0, done.stderr
        assert ENSEMBLE in done.stdout
    run.workspace = workspace
    return run


def scores(type_in) -> dict:
    return json.loads((type_in.workspace / f"metrics_output/ensembles/{ENSEMBLE}/metrics.json").read_text())


def test_the_setting_that_it_was_built_with_answers_test_rows(type_in):
    """Three members of which `trim` 0.4 leaves the middle one, and the default 0.2 all."""
    record = json.loads((type_in.workspace / f"ensembles/models/{ENSEMBLE}/ensemble.json").read_text())
    assert record["method"] == METHOD
    labels = arrays("test", 1)["labels"]
    members = softmax(np.stack([arrays("test", seed)["logits"] for seed in (1, 2, 3)]))
    middle = np.median(members, axis=0)
    p_true = (middle / middle.sum(axis=1, keepdims=True))[np.arange(len(labels)), labels]
    assert scores(type_in)["log_loss"] == pytest.approx(-np.log(p_true).mean(), rel=1e-6)
    crossfit = np.load(type_in.workspace / f"ensembles/models/{ENSEMBLE}/crossfit.npz")
    logits = softmax(np.stack([arrays("oof", seed)["logits"] for seed in (1, 2, 3)]))
    expected = np.median(logits, axis=0) / np.median(logits, axis=0).sum(axis=1, keepdims=True)
    row = arrays("oof", 1)["sample_ids"].tolist().index(crossfit["sample_ids"][crossfit["split"] == "train"][0])
    np.testing.assert_allclose(crossfit["probabilities"][crossfit["split"] == "train"][0], expected[row], rtol=1e-5)


def test_another_value_of_the_setting_builds_it_again(type_in):
    same, other, back = type_in(*(("build-ensemble", trim) for trim in (TRIM, 0.1, TRIM)))
    assert re.search(rf"{ENSEMBLE} +up to date", same.stdout)
    assert re.search(rf"{ENSEMBLE} +built", other.stdout)
    assert re.search(rf"{ENSEMBLE} +built", back.stdout)


def test_the_metric_is_in_the_scores(type_in):
    p = softmax(np.stack([arrays("test", seed)["logits"] for seed in (1, 2, 3)]))
    middle, labels = np.median(p, axis=0), arrays("test", 1)["labels"]
    top_2 = np.argsort(-middle, axis=1)[:, :2]
    assert scores(type_in)["top_2_accuracy"] == pytest.approx((top_2 == labels[:, None]).any(axis=1).mean())


def test_it_is_exported(type_in):
    on = ("--set", "exports.enable=true", "--set", "exports.formats=[torchscript,onnx]")
    (done,) = type_in(("export", "--model-name", ENSEMBLE, *on, TRIM))
    assert done.code == 0, done.stderr
    status = json.loads((type_in.workspace / f"deployment_models/{ENSEMBLE}/export_status.json").read_text())
    assert {status[format]["status"] for format in ("torchscript", "onnx")} == {"ok"}


def test_the_tests_of_the_page_pass(project):
    least = {
        "tests/combiners/test_combiner_battery.py": 20,
        TEST_FILE: 1,
        "tests/core/test_config.py": 1,
        "tests/commands/test_contract.py": 1,
    }
    words = f"{METHOD} or defaults_are_the_printed or keys_of_the_configuration"  # TEST_FILE has METHOD in its name
    done = run_python("-m", "pytest", "-v", "-p", "no:cacheprovider", *least, "-k", words, cwd=project)
    assert done.returncode == 0, done.stdout
    passed = Counter(re.findall(r"^(\S+?)::.* PASSED", done.stdout, re.MULTILINE))
    assert all(passed[file] >= count for file, count in least.items()), done.stdout


def test_what_the_page_says_to_type_exists():
    block = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1]
    orchestrator, own, battery = block.splitlines()
    parsed = ensemble_orchestrator.build_parser().parse_args(orchestrator.split()[2:])
    assert METHOD in parsed.set[0]
    assert own.split()[3] == TEST_FILE
    assert (PROJECT / battery.split()[3]).is_file()
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (PROJECT / target).exists(), target
