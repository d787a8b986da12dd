"""The specification's command lines, typed one after the other as they are printed, and what they leave behind."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, run_python

import ensemble_orchestrator

FULL = "--config configs/ensemble_config.yaml"
USAGE = (
    "discover",
    f"build-ensemble {FULL}",
    f"stack {FULL}",
    f"fusion-train {FULL}",
    f"meta-fuse {FULL}",
    f"distill {FULL}",
    f"evaluate {FULL}",
    "export --model-name soft_voting_ensemble",
)
DEBUG = (
    "debug --section discover --verbose",
    "debug --section smoke --arch CustomViTHybrid --fast",
    "debug --section kfold --fast",
    "debug --section extract_embeddings --arch CustomConvNeXt --fast",
    "debug --section build_ensemble --dry-run",
    "debug --section stack --fast",
    "debug --section fusion_train --fast",
    "debug --section distill --fast",
    "debug --section recompute_bn --arch CustomViTHybrid",
    "debug --section export --dry-run",
    "debug --section all --fast",
)
QUICK_START = (
    "discover",
    "build-ensemble --config configs/quick_ensemble.yaml",
    "export --model-name soft_voting_ensemble",
)
ADVANCED = (
    *(f"build-ensemble {FULL}", f"stack {FULL}", f"fusion-train {FULL}", f"meta-fuse {FULL}"),
    *(f"evaluate {FULL}", f"distill {FULL}"),
)
LINES = (*USAGE, *DEBUG, *QUICK_START, *ADVANCED)
QUICK_FILE = """\
backbones:
  include:
    - CustomConvNeXt
    - CustomViTHybrid
    - CustomSwinTransformer
runs:
  score_ensemble:
    enable: true
    methods: [soft_voting, hard_voting]
"""
"""What the Quick Start writes with `cat`."""
EXPORTED = ("metadata.json", "class_mapping.json", "export_status.json", "checksums.json")
LEFT_OUT = 4  # something that was asked for is not there, such as a library for one format, and is named


def command_of(line: str) -> str:
    return line.split()[0]


MISSING = sorted({command_of(line) for line in LINES} - set(ensemble_orchestrator.COMMANDS))


@pytest.mark.parametrize("line", sorted({line for line in LINES if command_of(line) not in MISSING}))
def test_a_printed_line_is_understood(line):
    parsed = ensemble_orchestrator.build_parser().parse_args(shlex.split(line))
    assert parsed.command == command_of(line)


def test_the_quick_start_s_file_is_here_as_it_is_printed():
    kept = yaml.safe_load((PROJECT / "configs" / "quick_ensemble.yaml").read_text(encoding="utf-8"))
    assert kept == yaml.safe_load(QUICK_FILE)


@pytest.mark.slow
def test_every_printed_command_exists():
    assert not MISSING, f"the specification prints commands that this version has not: {', '.join(MISSING)}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory, trained) -> tuple[Path, dict[str, str]]:
    """A trained workspace after every line, in the order in which they are printed; {line: what was left out}."""
    workspace = Path(shutil.copytree(trained, tmp_path_factory.mktemp("walk") / "workspace"))
    left_out: dict[str, str] = {}
    for line in LINES:
        if command_of(line) in MISSING:
            continue
        done = run_python("ensemble_orchestrator.py", *shlex.split(line), "--workspace", str(workspace))
        ended = f"{line}: ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode in (0, LEFT_OUT), ended
        assert "Traceback" not in done.stderr, ended
        if done.returncode == LEFT_OUT:
            left_out[line] = "\n".join(each for each in done.stderr.splitlines() if each.startswith("left out: "))
            assert left_out[line], ended
    return workspace, left_out


@pytest.mark.slow
class TestAfterTheWalk:
    def test_nothing_is_left_out_but_what_is_named(self, walked):
        _, left_out = walked
        allowed = {command_of(line) for line in left_out} - {"export"}
        if not MISSING:
            assert not allowed, left_out
        for line, reasons in left_out.items():
            print(f"{line}\n{reasons}", file=sys.stderr)

    def test_discovery_left_a_catalog_and_the_caches(self, walked):
        workspace, _ = walked
        found = json.loads((workspace / "ensembles" / "ensemble_catalog.json").read_text())
        assert {"CustomConvNeXt", "CustomViTHybrid"} <= found["members"].keys()
        assert list((workspace / "ensembles" / "oof_predictions").iterdir())
        assert (workspace / "ensembles" / "fusion_embeddings" / "CustomConvNeXt" / "val.npy").is_file()

    @pytest.mark.parametrize(
        "name", ["soft_voting_ensemble", "stacking_xgb", "meta_fuser", "fusion_concat_mlp", "distilled_mobile"]
    )
    def test_there_are_metrics(self, walked, name):
        needs = {"fusion_concat_mlp": "fusion-train", "distilled_mobile": "distill"}.get(name)
        if needs in MISSING:
            pytest.skip(f"the command {needs} does not exist yet")
        workspace, _ = walked
        if name == "distilled_mobile":  # the last printed line makes it, and nothing after that scores it
            done = run_python("ensemble_orchestrator.py", "evaluate", "--workspace", str(workspace))
            assert done.returncode in (0, LEFT_OUT), done.stderr
        metrics = json.loads((workspace / "metrics_output" / "ensembles" / name / "metrics.json").read_text())
        assert 0 < metrics["accuracy"] <= 1

    @pytest.mark.skipif("export" in MISSING, reason="the command export does not exist yet")
    def test_the_export_has_the_printed_structure(self, walked):
        folder = walked[0] / "deployment_models" / "soft_voting_ensemble"
        assert all((folder / name).is_file() for name in EXPORTED)
        status = json.loads((folder / "export_status.json").read_text())
        for form in ("state_dict", "checkpoint", "torchscript", "onnx"):
            assert status[form]["status"] == "ok", (form, status[form])
            assert any((folder / form).iterdir())

    @pytest.mark.skipif("debug" in MISSING, reason="the command debug does not exist yet")
    def test_debug_wrote_into_its_sandbox(self, walked):
        assert (walked[0] / "debug_tmp").is_dir()


@pytest.mark.slow
def test_the_printed_test_file_runs():
    """`cd tests` and `pytest debug_tests.py -v`."""
    assert (PROJECT / "tests" / "debug_tests.py").is_file(), "tests/debug_tests.py, which is printed, is not there"
    assert find_spec("pytest")
    done = run_python("-m", "pytest", "debug_tests.py", "-v", "-p", "no:cacheprovider", cwd=PROJECT / "tests")
    assert done.returncode == 0, done.stdout
