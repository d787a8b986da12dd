"""The bundled base pipeline's recovery state, its plots and its check of itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import PROJECT, run_python
from torch import nn

from config import settings
from models import create_custom_backbone
from utils.checkpoint_manager import CheckpointManager


def test_recovery_state_is_kept_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "BACKBONES", ["CustomA", "CustomB", "CustomC"])
    manager = CheckpointManager(tmp_path)
    assert manager.get_next_backbone_to_train() == "CustomA"
    assert not (tmp_path / ".recovery_state.json").exists()
    manager.save_kfold_progress("CustomA", {"fold": 2})
    assert CheckpointManager(tmp_path).load_kfold_progress("CustomA") == {"fold": 2}
    manager.mark_backbone_complete("CustomA", {"accuracy": 0.5})
    manager.mark_backbone_complete("CustomA", {"accuracy": 0.75})
    assert manager.load_kfold_progress("CustomA") is None
    state = json.loads((tmp_path / ".recovery_state.json").read_text(encoding="utf-8"))
    assert (state["completed_backbones"], state["results"]) == (["CustomA"], {"CustomA": {"accuracy": 0.75}})
    assert state["timestamp"]
    status = manager.get_recovery_status()
    assert (status["completed"], status["remaining"]) == (["CustomA"], ["CustomB", "CustomC"])
    assert manager.get_next_backbone_to_train() == status["next"] == "CustomB"
    assert "remaining: CustomB, CustomC" in manager.export_recovery_summary().read_text(encoding="utf-8")
    manager.reset_recovery()
    assert manager.get_completed_backbones() == []


def test_a_damaged_recovery_state_is_named(tmp_path):
    (tmp_path / ".recovery_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"\.recovery_state\.json"):
        CheckpointManager(tmp_path).get_completed_backbones()


def test_the_latest_checkpoint_goes_by_role(tmp_path):
    manager = CheckpointManager(tmp_path)
    assert manager.get_latest_backbone_checkpoint("CustomA") is None
    for role in ("head_best", "finetune_best", "final"):
        path = tmp_path / f"CustomA_{role}.pth"
        path.touch()
        assert manager.get_latest_backbone_checkpoint("CustomA") == path
    assert manager.get_latest_backbone_checkpoint("CustomB") is None


def test_plots_say_that_they_come_later_and_load_nothing(tmp_path):
    script = tmp_path / "plots.py"
    script.write_text(
        "import sys\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:\n"
        "    del sys.modules[name]  # of the process that this one may be a fork of\n"
        "import utils\n"
        "from utils.visualization import generate_all_visualizations\n"
        "print(generate_all_visualizations(None, 'CustomConvNeXt', {}, None, [], None, None))\n"
        "print('matplotlib' in sys.modules)"
    )
    answer = run_python(str(script), environment={"PYTHONPATH": str(PROJECT)})
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["{}", "False"]
    assert "plots come with a later version" in answer.stderr


def test_the_self_check_runs_every_backbone_and_counts_a_broken_one(monkeypatch):
    path = Path(settings.__file__).parent.parent / "tests" / "test_suite.py"
    spec = importlib.util.spec_from_file_location("base_test_suite", path)
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    assert suite.run_all_unit_tests() == (15, 0)

    def one_broken(name: str, num_classes: int, **options: object) -> nn.Module:
        return create_custom_backbone(name, num_classes + (name == "CustomRegNet"), **options)

    monkeypatch.setattr(suite, "create_custom_backbone", one_broken)
    assert suite.run_all_unit_tests() == (14, 1)
