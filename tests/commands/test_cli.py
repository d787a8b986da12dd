"""The command line as users type it: the specification's Quick Start, exit codes, messages, what is imported."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_disk
from conftest import PROJECT, run_python
from in_process import run
from short_fits import few_fits

import ensemble_orchestrator
import ensemble_system
from utils import commands
from utils.core import errors
from utils.discovery import discover
from utils.predictions import image_splits

QUICK = ("--config", "configs/quick_ensemble.yaml")
DEMO = ("--config", "configs/votes.yaml")
FROM_ANYWHERE = {"PYTHONPATH": str(PROJECT)}


@pytest.fixture
def script(tmp_path):
    """Write a program into a file, as which it starts where torch is imported already; returns its path."""

    def write(code: str) -> str:
        path = tmp_path / "program.py"
        path.write_text(code)
        return str(path)

    return write


@pytest.fixture(scope="module")
def small(tmp_path_factory, synthetic) -> Path:
    """Sixteen images and three networks after `pipeline`. Read it only."""
    workspace = Path(shutil.copytree(synthetic, tmp_path_factory.mktemp("small") / "w"))
    done = run("pipeline", *DEMO, workspace=workspace)
    assert done.code == 0, done.stderr
    return workspace


@pytest.fixture
def own_small(tmp_path, small) -> Path:
    return Path(shutil.copytree(small, tmp_path / "small"))


def test_help_lists_what_works_and_loads_nothing_heavy():
    code = (
        "import sys, ensemble_orchestrator as o\n"
        "try: o.main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'sklearn', 'PIL', 'timm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    for command in ("discover", "build-ensemble", "evaluate", "pipeline", "status", "clean"):
        assert re.search(rf"^    {command}\s", done.stdout, re.MULTILINE)


def test_the_version_is_printed_to_standard_output(capsys):
    with pytest.raises(SystemExit) as caught:
        ensemble_orchestrator.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr() == (f"ensemble-system {ensemble_system.__version__}\n", "")


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_has_help_with_an_example_and_the_common_options(command, capsys):
    with pytest.raises(SystemExit) as caught:
        ensemble_orchestrator.main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"Example: python ensemble_orchestrator.py {command}" in shown
    assert all(option in shown for option in commands.COMMON_OPTIONS)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError("x"), 1),
        (FileNotFoundError("x"), 1),
        (errors.ConfigError("x"), 2),
        (errors.ContaminatedError("x"), 3),
        (errors.LeakageError("x"), 3),
        (errors.PartialFailure("x"), 4),
        (ZeroDivisionError("x"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error, code):
    assert ensemble_orchestrator.exit_code(error) == code


def test_the_quick_start_of_the_specification(trained, tmp_path, orchestrator):
    """discover, the heredoc's configuration, build-ensemble: the lines as printed."""
    workspace = shutil.copytree(trained, tmp_path / "w")
    done = orchestrator("discover", workspace=workspace)
    assert done.returncode == 0, done.stderr
    catalog = json.loads((workspace / "ensembles" / "ensemble_catalog.json").read_text())
    trained = sorted(name for name, member in catalog["members"].items() if member["source"] == "trained")
    assert trained == ["CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid"]
    done = orchestrator("build-ensemble", *QUICK, workspace=workspace)
    assert done.returncode == 0, done.stderr
    assert "Model CustomSwinTransformer not found, skipping" in done.stderr
    models = workspace / "ensembles" / "models"
    assert sorted(path.name for path in models.iterdir()) == ["hard_voting_ensemble", "soft_voting_ensemble"]
    record = json.loads((models / "soft_voting_ensemble" / "ensemble.json").read_text())
    assert record["members"] == ["CustomConvNeXt", "CustomViTHybrid"]
    files = {path.name for path in (models / "soft_voting_ensemble").iterdir()}
    assert files == {"ensemble.json", "combiner.safetensors", "crossfit.npz", "provenance.npz"}


def test_the_full_configuration_builds_every_method_it_lists(own_small, orchestrator):
    with few_fits():
        done = orchestrator("build-ensemble", "--config", "configs/ensemble_config.yaml", workspace=own_small)
    assert done.returncode == 0, done.stderr
    assert "soft_voting_ensemble" in done.stdout
    assert "greedy_soup_CustomConvNeXt           built" in done.stdout
    record = json.loads((own_small / "ensembles" / "models" / "weighted_ensemble" / "ensemble.json").read_text())
    assert sum(record["weights"].values()) == pytest.approx(1)
    assert record["duality_gap"] <= 1e-9


def test_pipeline_twice_does_nothing_the_second_time_and_loads_no_torch(own_small):
    before = {path: path.stat().st_mtime_ns for path in (own_small / "ensembles" / "models").rglob("*")}
    code = (
        "import sys, ensemble_orchestrator as o\n"
        "codes = [o.main([command, *sys.argv[1:]]) for command in ('build-ensemble', 'evaluate')]\n"
        "assert codes == [0, 0], codes\n"
        "assert not {'torch', 'sklearn', 'PIL'} & set(sys.modules)"
    )
    done = run_python("-c", code, *DEMO, "--workspace", str(own_small))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("up to date") == 4
    assert before == {path: path.stat().st_mtime_ns for path in (own_small / "ensembles" / "models").rglob("*")}


def test_json_is_alone_on_stdout(own_small, orchestrator):
    for command in (("discover", "--verify"), ("build-ensemble", "--force"), ("evaluate",), ("pipeline",)):
        done = orchestrator(*command, *DEMO, "--json", workspace=own_small)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["failures"] == []


def test_force_gives_the_same_bytes(small, own_small, orchestrator):
    done = orchestrator("build-ensemble", "--force", *DEMO, workspace=own_small)
    assert done.returncode == 0, done.stderr
    for path in (own_small / "ensembles" / "models").rglob("*"):
        if path.is_file() and not path.name.startswith("predictions_"):
            assert path.read_bytes() == (small / path.relative_to(own_small)).read_bytes(), path


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("build-ensemble", *DEMO), 1, "Catalog not found"),
        (("evaluate", *DEMO), 1, "Run `python ensemble_orchestrator.py discover` first"),
        (("discover", "--config", "configs/nowhere.yaml"), 2, "nowhere.yaml"),
        (("discover", "--set", "runs.score_ensemble.method=x"), 2, "did you mean 'methods'"),
        (("discover", "--device", "gpu"), 2, "device"),
        (("discover", *DEMO), 1, "Split the images first"),
    ],
)
def test_mistakes_in_an_empty_workspace(tmp_path, orchestrator, options, code, words):
    done = orchestrator(*options, workspace=tmp_path)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_missing_workspace_and_a_wrong_base_back_are_named(tmp_path, orchestrator, trained):
    done = orchestrator("discover", workspace=tmp_path / "none")
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    done = orchestrator("discover", "--base-back", str(tmp_path), workspace=trained, apart=True)
    assert done.returncode == 1
    assert "not a BASE-BACK" in done.stderr


def test_usage_errors_end_with_2():
    assert run_python(str(PROJECT / "ensemble_orchestrator.py"), "discovr").returncode == 2
    assert run_python(str(PROJECT / "ensemble_orchestrator.py")).returncode == 2


def test_a_workspace_without_networks_says_how_to_train(tmp_path, trained, orchestrator):
    shutil.copytree(trained / "split_dataset", tmp_path / "split_dataset")
    done = orchestrator("discover", workspace=tmp_path)
    assert done.returncode == 1
    assert "no trained model" in done.stderr
    assert "make demo" in done.stderr
    assert not (tmp_path / "ensembles" / "ensemble_catalog.json").exists()


def test_a_bug_is_one_line_and_its_traceback_is_in_the_log(own_small, monkeypatch):
    monkeypatch.setattr(discover, "discover", lambda *arguments, **options: 1 / 0)
    done = run("discover", workspace=own_small)
    assert done.code == 70
    assert len(done.stderr.strip().splitlines()) == 1
    assert "bug: ZeroDivisionError: division by zero; traceback in" in done.stderr
    log = (own_small / "debug_logs" / "ensemble_orchestrator.log").read_text()
    assert "Traceback (most recent call last)" in log


def full_at(place: str, way: str, patch: pytest.MonkeyPatch) -> None:
    """Let the disk be full where a file is renamed to `place`, or where NumPy writes any file."""
    replace = Path.replace

    def failing_replace(self, target):
        if str(target).endswith(place):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    def short_write(*arguments, **options):
        raise OSError("4096 requested and 100 written")  # NumPy's words, without a number

    if way == "replace":
        patch.setattr(Path, "replace", failing_replace)
    else:
        patch.setattr(np, "savez", short_write)


@pytest.mark.parametrize(
    ("command", "place", "way"),
    [
        ("discover", "ensemble_catalog.json", "replace"),
        ("build-ensemble", "soft_voting_ensemble/combiner.safetensors", "replace"),
        ("build-ensemble", "soft_voting_ensemble/crossfit.npz", "savez"),
        ("evaluate", "ranking.json", "replace"),
    ],
)
def test_a_full_disk_names_the_file_and_the_remedy_and_leaves_nothing_half_written(own_small, command, place, way):
    before = {path: path.read_bytes() for path in own_small.rglob("*.json")}
    typed = (command, "--force", "--quiet", *DEMO)
    with pytest.MonkeyPatch.context() as patch:
        full_at(place, way, patch)
        done = run(*typed, workspace=own_small)
    assert done.code == 1
    line = done.stderr.strip().splitlines()[-1]
    assert f"{place}: cannot be written (" in line
    assert ("No space left on device" if way == "replace" else "4096 requested and 100 written") in line
    assert "Free some space (`python ensemble_orchestrator.py clean` lists files that can be removed)" in line
    assert "Traceback" not in done.stderr
    assert not list(own_small.rglob(".*partial*"))
    assert not (own_small / "ensembles" / ".lock").exists()
    if place.endswith(".json"):
        written = next(path for path in before if str(path).endswith(place))
        assert written.read_bytes() == before[written]
    else:  # an ensemble without its record is none
        assert not (own_small / "ensembles" / "models" / "soft_voting_ensemble" / "ensemble.json").exists()
    done = run(*typed, workspace=own_small)
    assert done.code == 0, done.stderr


@pytest.mark.parametrize(
    ("place", "file"),
    [
        # The first and the last page of an embedding file fit, what lies between does not.
        ("ensembles/fusion_embeddings", r"CustomConvNeXt/val\.npy: cannot be written \(No space left on device\)"),
        ("image_cache", r"36_[0-9a-f]{16}\.npy: No space left on device"),
    ],
)
def test_a_disk_that_fills_is_an_error_and_no_signal(own_copy, place, file):
    """A real disk of two pages in the place of one of our folders."""
    small = own_copy / place
    for folder in (small, own_copy / "ensembles" / "predictions"):
        shutil.rmtree(folder)
    small.mkdir()
    command = ("build-ensemble", "--force", "--quiet", *DEMO)
    done = run_python(small_disk.PROGRAM, str(small), *command, "--workspace", str(own_copy))
    if done.returncode == small_disk.NOT_MOUNTED:
        pytest.skip("no disk can be mounted here")
    assert done.returncode == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert re.search(f"{re.escape(str(small))}/{file}\\. Free some space", line), line
    assert done.stdout == ""  # nothing is left on the small disk
    assert not list(own_copy.rglob(".*partial*"))
    assert not list((own_copy / "ensembles").rglob("predictions/**/record.json"))
    done = run(*command, workspace=own_copy)
    assert done.code == 0, done.stderr


def test_a_file_that_vanishes_in_between_is_named_with_a_remedy(own_small, monkeypatch):
    list_images = image_splits.list_images

    def late(split_dir, split, digests):
        find = digests.of

        def of(path):
            path.unlink()
            digests.of = find
            return find(path)

        digests.of = of
        return list_images(split_dir, split, digests)

    monkeypatch.setattr(image_splits, "list_images", late)
    done = run("discover", *DEMO, "--quiet", workspace=own_small)
    assert done.code == 1
    (line,) = done.stderr.strip().splitlines()
    assert re.search(r"split_dataset/train/bright/\d+\.png: No such file or directory\. It was removed meanwhile", line)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_nothing_half_written(own_small, script, sent, code):
    hold = (
        "import sys, time, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "import ensemble_orchestrator as o, utils.predictions.streaming as s\n"
        "original = s.open_network\n"
        "def slow(spec):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "s.open_network = slow\n"
        "sys.exit(o.main(sys.argv[1:]))"
    )
    shutil.rmtree(own_small / "ensembles" / "predictions")
    process = subprocess.Popen(
        [sys.executable, script(hold), "build-ensemble", "--force", *DEMO, "--workspace", str(own_small)],
        cwd=PROJECT,
        env=os.environ | FROM_ANYWHERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    assert json.loads((own_small / "ensembles" / ".lock").read_text())["command"] == "build-ensemble"
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not (own_small / "ensembles" / ".lock").exists()
    assert not list((own_small / "ensembles").rglob(".*partial*"))


def test_same_result_from_another_folder(own_small, tmp_path, orchestrator):
    foreign = tmp_path / "elsewhere"
    (foreign / "utils").mkdir(parents=True)
    (foreign / "models").mkdir()
    (foreign / "config.py").write_text("raise RuntimeError('foreign')")
    done = orchestrator("evaluate", "--force", "--plots", "none", *DEMO, workspace=own_small, cwd=foreign)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in foreign.iterdir()) == ["config.py", "models", "utils"]


def test_every_file_of_arrays_is_free_of_pickles(built):
    files = [*built.rglob("*.npz"), *built.rglob("*.npy")]
    assert len(files) > 20
    for path in files:
        loaded = np.load(path, allow_pickle=False)
        for name in getattr(loaded, "files", []):
            assert loaded[name].dtype != object


def test_times_are_shown_as_the_base_pipeline_shows_them(own_small, orchestrator):
    done = orchestrator("discover", "--verify", "--force", *DEMO, workspace=own_small)
    assert re.search(r"^\d\d:\d\d:\d\d \| INFO \| verify CustomConvNeXt: ran on ", done.stderr, re.MULTILINE)
