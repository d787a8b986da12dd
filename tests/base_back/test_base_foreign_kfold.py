"""K-fold by the bundled pipeline over the architectures of somebody else's BASE-BACK, on the split they have."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import foreign_base_back
import numpy as np
import pytest
import torch
from conftest import run_python
from PIL import Image
from torch import nn

from training.external import last_linear_layers

NAMES = ("CustomConvNeXt", "CustomCoAtNet")
OPTIONS = ("--backbones", *NAMES, "--stages", "kfold", "--folds", "2", "--epochs-head", "1", "--epochs-finetune", "1")
PIXELS = {"DBT_IMG_SIZE": "32", "PYTHONDONTWRITEBYTECODE": ""}  # it would hide what our loader writes
STATE = {"completed_backbones": ["CustomConvNeXt"], "results": {"CustomConvNeXt": {"accuracy": 0.5}}, "timestamp": "x"}
RESULTS = {"backbone": "CustomConvNeXt", "k_folds": 5, "fold_accuracies": [0.5], "mean_accuracy": 0.5}


class Case(NamedTuple):
    base_back: Path
    workspace: Path
    before: dict[str, str]
    done: object


def listing(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory, trained, base_main) -> Case:
    """A workspace as a foreign pipeline leaves it (a split without our manifest), after our K-fold."""
    place = tmp_path_factory.mktemp("foreign")
    base_back = foreign_base_back.build(place / "theirs", "BASE-BACK")
    workspace = place / "workspace"
    shutil.copytree(trained / "split_dataset", workspace / "split_dataset")
    (workspace / "split_dataset" / "split_manifest.json").unlink()
    for name, record in (
        ("checkpoints/.recovery_state", STATE),
        ("kfold_results/CustomConvNeXt_kfold_results", RESULTS),
    ):
        path = workspace / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record), encoding="utf-8")
    before = listing(base_back)
    done = base_main("--base-back", str(base_back), *OPTIONS, "--json", workspace=workspace, environment=PIXELS)
    assert done.returncode == 0, done.stderr
    return Case(base_back, workspace, before, done)


@pytest.fixture
def stranger(case, monkeypatch) -> Iterator[ModuleType]:
    """Their models as their own package, imported without our loader."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(case.base_back))
    monkeypatch.setenv("DBT_BASE_DIR", str(case.workspace))
    yield importlib.import_module("src.models")
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]


def pixels_of(path: Path) -> torch.Tensor:
    from utils.datasets import create_optimized_transforms

    with Image.open(path) as image:
        return create_optimized_transforms(32, is_training=False)(image.convert("RGB"))


def test_the_fold_networks_are_theirs_and_give_the_out_of_fold_logits(case, stranger):
    assert json.loads(case.done.stdout)["failed"] == {}
    train = case.workspace / "split_dataset" / "train"
    for name in NAMES:
        with np.load(case.workspace / "kfold_results" / f"{name}_oof_predictions.npz", allow_pickle=False) as arrays:
            oof = dict(arrays)
        assert sorted(oof["sample_ids"]) == sorted(f"{path.parent.name}/{path.name}" for path in train.glob("*/*.png"))
        for fold in (0, 1):
            record = torch.load(case.workspace / "checkpoints" / f"{name}_fold{fold}.pth", weights_only=True)
            extra = record["extra"]
            assert (extra["base_back"], extra["model_size"], extra["img_size"]) == ("external", "full", 32)
            network = stranger.create_custom_backbone(name, 4).eval()
            network.load_state_dict(record["model_state_dict"])
            rows = np.flatnonzero(oof["fold"] == fold)
            images = torch.stack([pixels_of(train / str(sample_id)) for sample_id in oof["sample_ids"][rows]])
            with torch.no_grad():
                assert np.allclose(network(images).numpy(), oof["logits"][rows], atol=1e-5)
            assert oof["logits"][rows].std() > 0.01


def test_nothing_is_written_into_their_folder_and_their_records_stay(case):
    assert listing(case.base_back) == case.before
    assert not list(case.workspace.glob("*.log"))
    state = json.loads((case.workspace / "checkpoints" / ".recovery_state.json").read_text())
    assert state["completed_backbones"] == STATE["completed_backbones"]
    assert state["results"] == STATE["results"]
    kept = case.workspace / "kfold_results" / "CustomConvNeXt_kfold_results.before.json"
    assert json.loads(kept.read_text()) == RESULTS
    assert json.loads((case.workspace / "kfold_results" / "CustomConvNeXt_kfold_results.json").read_text())["oof_file"]
    assert not (case.workspace / "metrics_output" / "pipeline_summary.json").exists()


def test_changed_code_of_theirs_is_other_work_and_equal_code_is_known(case, base_main, tmp_path):
    changed = shutil.copytree(case.base_back, tmp_path / "BASE-BACK")
    workspace = shutil.copytree(case.workspace, tmp_path / "w")
    arguments = (*OPTIONS, "--backbones", "CustomConvNeXt", "--json")
    options = {"workspace": workspace, "environment": PIXELS}
    done = base_main("--base-back", str(changed), *arguments, **options)
    assert json.loads(done.stdout)["done"] == []
    # Absolute imports alone, printing, and other weights: still theirs, and stdout stays one document.
    blocks = changed / "src" / "models" / "blocks.py"
    addition = "from config.settings import NUM_CLASSES\nassert NUM_CLASSES == 13\nprint('loaded')\n"
    blocks.write_text(blocks.read_text().replace("padding=1", "padding='same'") + addition)
    done = base_main("--base-back", str(changed), *arguments, **options)
    assert done.returncode == 0, done.stderr
    done_now = sorted(json.loads(done.stdout)["done"])  # folds are trained side by side and end in any order
    assert done_now == [f"CustomConvNeXt {unit}" for unit in ("fold 0", "fold 1", "oof")]
    assert not list(changed.rglob("__pycache__"))


def refusal(base_main: Callable, *options: str, workspace: Path) -> str:
    done = base_main(*options, workspace=workspace, environment=PIXELS)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_what_cannot_be_done_is_said(case, base_main, tmp_path):
    theirs = ("--base-back", str(case.base_back))
    assert "found train, export; with --base-back only verify, split, kfold" in refusal(
        base_main, *theirs, "--stages", "train", "export", workspace=tmp_path
    )
    assert "has no CustomRegNet; it has CustomConvNeXt, CustomResNetMish, CustomSwinTransformer" in refusal(
        base_main, *theirs, "--backbones", "CustomRegNet", workspace=tmp_path
    )
    assert "no src/models/__init__.py" in refusal(base_main, "--base-back", str(tmp_path), workspace=tmp_path)
    assert "one size: full" in refusal(base_main, *theirs, "--size", "tiny", workspace=tmp_path)
    broken = shutil.copytree(case.base_back, tmp_path / "BASE-BACK")
    (broken / "src" / "models" / "__init__.py").write_text("import a_module_that_nobody_has\n")
    assert "cannot be imported (ModuleNotFoundError" in refusal(
        base_main, "--base-back", str(broken), workspace=tmp_path
    )


def test_the_variable_of_the_mount_is_not_read(case, trained, tmp_path, base_main):
    shutil.copytree(trained / "split_dataset", tmp_path / "split_dataset")
    environment = {"BASE_BACK_DIR": str(case.base_back), "DBT_EXTERNAL_BASE_BACK": str(case.base_back)}
    options = ("--backbones", "CustomRegNet", "--stages", "verify", "--size", "tiny", "--json")
    done = base_main(*options, workspace=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"] == ["CustomRegNet verify"]


class TwoHeads(nn.Module):
    """Two heads that run, one of the same width that never does, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.hidden = nn.Linear(3, 8)
        self.head, self.head_dist, self.unused = (nn.Linear(8, 4) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.hidden(self.norm(images).mean((2, 3)))
        return (self.head(features) + self.head_dist(features)) / 2


def test_the_head_is_every_last_linear_layer_that_runs(stranger):
    model = TwoHeads()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert last_linear_layers(model, 4, 32, torch.device("cpu")) == [model.head, model.head_dist]
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model = stranger.create_custom_backbone("CustomCoAtNet", 4)
    assert last_linear_layers(model, 4, 32, torch.device("cpu")) == [model.head[6]]
    with pytest.raises(ValueError, match="no linear layer with 5 outputs runs"):
        last_linear_layers(model, 5, 32, torch.device("cpu"))


CALL = """
import sys
sys.path.insert(0, {src!r})
import config, models, utils
before = dict(sys.modules)
from pathlib import Path
from training.external import ExternalError, create_external, external_names
folder = Path({folder!r})
assert {{"CustomConvNeXt", "CustomCoAtNet"}} < set(external_names(folder))
network = create_external(folder, "CustomCoAtNet", 4)
assert type(network).__module__ == "external_base_back.models.architectures", type(network).__module__
assert all(sys.modules[name] is before[name] for name in ("config", "config.settings", "models", "utils"))
try:
    create_external(folder, "CustomNobody", 4)
except ExternalError as error:
    assert "gave None" in str(error)
"""


def test_our_modules_are_the_same_before_and_after(case, tmp_path):
    from conftest import PROJECT

    script = tmp_path / "call.py"
    script.write_text(CALL.format(src=str(PROJECT / "BASE-BACK" / "src"), folder=str(case.base_back)))
    done = run_python(str(script), environment=PIXELS | {"DBT_BASE_DIR": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "CustomNobody" in done.stderr
    assert not list(tmp_path.glob("*.log"))
    assert listing(case.base_back) == case.before
