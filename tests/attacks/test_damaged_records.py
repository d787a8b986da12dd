"""Damaged JSON records, generated: every command that reads one names the file or goes on."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import damage
import pytest
from damage import EXPORT
from given_predictions import write
from in_process import run

from utils.core import parsed_files
from utils.core.artifacts import FileDigests

VOTES = (
    *("--set", "runs.score_ensemble.methods=[soft_voting,weighted]", "--set", "pruning.enable=false"),
    *("--set", "runs.model_soup.enable=false", "--set", "device=cpu"),
)
STATUS, CLEAN, EVALUATE, DISCOVER = ("status",), ("clean",), ("evaluate",), ("discover",)
STACK = ("stack", "--set", "runs.stacking.meta_learners=[lr]")
COMPARE, VERIFY = ("export", "--compare"), ("export", "--verify", EXPORT)
READ_BY = {
    "ensembles/ensemble_catalog.json": (STATUS, EVALUATE, STACK),
    "ensembles/digests.json": (STATUS,),
    "ensembles/latency.json": (EVALUATE,),
    "ensembles/exported_files.json": (VERIFY,),
    "ensembles/predictions/forest/val/record.json": (STATUS,),
    "ensembles/models/weighted_ensemble/ensemble.json": (STATUS, EVALUATE),
    "metrics_output/ensembles/ranking.json": (STATUS, EVALUATE),
    "metrics_output/ensembles/soft_voting_ensemble/metrics.json": (COMPARE,),
    "checkpoints/.recovery_state.json": (CLEAN,),
    f"{EXPORT}/export_status.json": (COMPARE, VERIFY),
    f"{EXPORT}/metadata.json": (COMPARE, VERIFY),
    f"{EXPORT}/checksums.json": (VERIFY,),
}
"""{record: commands that read it}"""
pytestmark = pytest.mark.usefixtures("short_paths", "few_folds")
SECONDS = 120.0  # a hang, on however busy a machine


@pytest.fixture(scope="module")
def template(few_folds, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    write(folder / "given")
    workspace = folder / "workspace"
    (workspace / "checkpoints").mkdir(parents=True)
    for line in (("import-predictions", "--from", folder / "given"), ("build-ensemble", *VOTES), EVALUATE):
        done = run(*line, workspace=workspace)
        assert done.code == 0, done.stderr
    damage.export_by_hand(workspace)
    digests = FileDigests(workspace / "ensembles" / "digests.json")
    digests.of(workspace / "ensembles" / "ensemble_catalog.json")
    digests.keep("0" * 64, {"n": 3, "accuracy": 0.5, "refolded": {"fold0": [1, 2]}, "unreadable": []})
    digests.save()
    units = {"a train": {"files": {"a_final.pth": [1, 2, "0" * 64]}, "digest": "x", "result": {"accuracy": 0.5}}}
    (workspace / "checkpoints" / ".recovery_state.json").write_text(json.dumps({"units": units, "results": {}}))
    if not (workspace / "ensembles" / "latency.json").exists():
        timing = {"batches": {"batch_1": {"p50_ms": 1.0, "p95_ms": 2.0}}, "device": "cpu", "threads": 1, "network": "a"}
        latency = {"networks": {"0" * 64: {"cpu, threads: 1": timing}}, "combiners": {}}
        (workspace / "ensembles" / "latency.json").write_text(json.dumps(latency))
    return workspace


def judge(workspace: Path, record: str, line: tuple[str, ...], what: str) -> None:
    parsed_files.forget()
    start = time.monotonic()
    done = run(*line, workspace=workspace)
    shown = done.stdout + done.stderr
    description = f"{record}, {what}, {line[0]}: {done.code}: {done.stderr[-600:]}"
    assert done.code in (0, 1, 3, 4), description
    assert "Traceback" not in shown, description
    assert "\x1b" not in shown, description
    assert time.monotonic() - start < SECONDS, description
    assert done.code != 1 or str(workspace) in shown, description


def attack(template: Path, folder: Path, record: str, cases) -> int:
    """Judge each damage by every command that reads the record; return how many runs were judged.

    A damage has a workspace of its own only where the command before has changed the record's neighbours.
    """
    runs = 0
    workspace = Path(shutil.copytree(template, folder / "workspace"))
    names = sorted(path.relative_to(template) for path in template.rglob("*") if path.is_file())
    before = {name: (template / name).read_bytes() for name in names}
    for what, content in cases:
        for line in READ_BY[record]:
            (workspace / record).write_bytes(content)
            judge(workspace, record, line, what)
            runs += 1
            if any((workspace / name).read_bytes() != before[name] for name in names if str(name) != record):
                shutil.rmtree(workspace)
                shutil.copytree(template, workspace)
    return runs


@pytest.mark.parametrize("record", READ_BY)
def test_a_damaged_file_is_named(template, tmp_path, record):
    cases = list(damage.whole_files((template / record).read_bytes()))
    assert attack(template, tmp_path, record, cases[len(record) % 2 :: 2]) >= len(cases) // 2


@pytest.mark.parametrize("record", READ_BY)
def test_a_damaged_value_is_no_bug(template, tmp_path, record):
    assert attack(template, tmp_path, record, damage.values((template / record).read_bytes(), 0, 5)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("record", READ_BY)
def test_many_damaged_values_are_no_bug(template, tmp_path, record):
    content = (template / record).read_bytes()
    assert attack(template, tmp_path, record, [*damage.whole_files(content), *damage.values(content, 1, 60)]) >= 60
