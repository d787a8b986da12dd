"""`predict --from-export`: the answers of `predict` from members, by the file alone."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from finished_workspace import CONFIG, at
from in_process import run
from two_members import two_members

from utils.core.config_file import load_config
from utils.exporting import export
from utils.inference.predict import predict, predict_from_export

__all__ = ["two_members"]

NAME = "soft_voting_ensemble"
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import ensemble_orchestrator
code = ensemble_orchestrator.main(sys.argv[1:])
print([name for name, module in sys.modules.items() if "BASE-BACK" in (getattr(module, "__file__", "") or "")])
sys.exit(code)
"""
HEAVY = {"torch", "torchvision", "timm", "sklearn", "scipy", "xgboost", "onnx", "safetensors", "matplotlib"}
OF_BASE_BACK = {"config", "models", "training", "export"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, two_members):
    """(workspace, exported files by kind of input)"""
    base = Path(shutil.copytree(two_members, tmp_path_factory.mktemp("exported") / "workspace"))
    config, files = load_config(CONFIG, overrides=["exports.enable=true"]), {}
    for kind in ("float-nchw", "uint8-nhwc"):
        export.export(config, at(base), model_name=NAME, formats=["onnx"], input=kind, force=True)
        files[kind] = base / f"{kind}.onnx"
        shutil.copyfile(base / "deployment_models" / NAME / "onnx" / f"{NAME}.onnx", files[kind])
    return base, files


@pytest.mark.parametrize("kind", ["float-nchw", "uint8-nhwc"])
def test_it_agrees_with_predict_from_members(exported, kind):
    base, files = exported
    folder = str(base / "split_dataset" / "test")
    options = {"paths": [folder], "probabilities": True}
    expected = predict(load_config(CONFIG), at(base), model_name=NAME, **options).document["images"]
    found = predict_from_export(from_export=str(files[kind]), **options).document["images"]
    assert [record["path"] for record in found] == [record["path"] for record in expected]
    assert [record["class"] for record in found] == [record["class"] for record in expected]
    given, wanted = (
        np.array([list(record["probabilities"].values()) for record in records]) for records in (found, expected)
    )
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5)
    assert {(record["set"], record["abstain"], record["disagreement"]) for record in found} == {(None, None, None)}


def test_neither_torch_nor_base_back_nor_a_workspace_is_needed(tmp_path, exported):
    base, files = exported
    done = subprocess.run(
        [
            *(sys.executable, "-c", BLOCKED.format(blocked=HEAVY | OF_BASE_BACK), "predict", "--from-export"),
            *(str(files["float-nchw"]), str(base / "split_dataset" / "test"), "--to", str(tmp_path / "answers.csv")),
        ],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(PROJECT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BASE_BACK_DIR": "/nowhere",
            "DBT_BASE_DIR": "/nowhere",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list((base / "split_dataset" / "test").rglob("*.png")))
    assert {row["model"].partition("@")[0] for row in rows} == {"float-nchw"}


def test_what_cannot_be_read_is_a_record_and_the_rest_goes_on(tmp_path, exported):
    base, files = exported
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    image = next((base / "split_dataset" / "test").rglob("*.png"))
    done = run("predict", "--from-export", files["uint8-nhwc"], broken, image, "--json")
    assert done.code == 4
    first, second = done.document["images"]
    assert first["class"] is None
    assert first["error"].startswith("cannot be decoded (cannot identify image file")
    assert second["error"] is None


def test_answers_of_two_files_do_not_go_into_one(tmp_path, exported):
    base, files = exported
    images, to = base / "split_dataset" / "test", tmp_path / "answers.jsonl"
    assert run("predict", "--from-export", files["float-nchw"], images, "--to", to).code == 0
    before = to.read_bytes()
    again = run("predict", "--from-export", files["float-nchw"], images, "--to", to, "--append", "--json")
    assert (again.code, again.document["answered"], to.read_bytes()) == (0, 0, before)
    other = run("predict", "--from-export", files["uint8-nhwc"], images, "--to", to, "--append")
    assert other.code == 1
    assert to.read_bytes() == before
    assert len({json.loads(line)["model"] for line in before.splitlines()}) == 1
    damaged = before.replace(b'"path"', b'"path""', 1)
    to.write_bytes(damaged)
    refused = run("predict", "--from-export", files["float-nchw"], images, "--to", to, "--append")
    assert refused.code == 1
    assert f"{to}: the record that begins in line 1 " in refused.stderr
    assert to.read_bytes() == damaged


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--from-export", "gone.onnx"), 1, "--from-export gone.onnx: No such file"),
        (("--from-export", __file__), 1, "it is no ONNX file"),
        (("--from-export", "a.onnx", "--model-name", "b"), 2, "not allowed with argument"),
        ((), 2, "one of the arguments --model-name --from-export is required"),
    ],
)
def test_a_file_that_is_no_export_is_named(options, code, words):
    done = run("predict", *options, __file__)
    assert done.code == code
    assert words in done.stderr
