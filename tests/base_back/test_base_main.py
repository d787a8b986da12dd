"""The base pipeline's functions, called as its contract writes them."""

from __future__ import annotations

import shutil
import sys

import pytest
from conftest import PROJECT, run_python

CALLS = """
import sys
sys.path.insert(0, {src!r})
import main
from models import create_custom_backbone_safe
from utils.datasets import prepare_datasets_for_backbone

if __name__ == "__main__":
    train, val = prepare_datasets_for_backbone("CustomConvNeXt", 32)
    model = create_custom_backbone_safe("CustomConvNeXt", 2)
    model, best, history, metrics = main.train_backbone_with_metrics("CustomConvNeXt", model, train, val, 1, 2)
    assert len(history["head"]) == 1 and len(history["finetune"]) == 2 and len(history["head"][0]) == 5
    assert best == metrics["best_accuracy"] and metrics["epochs_finetune"] == 2
    assert model(train[0][0][None]).shape == (1, 2)
    mean, deviation, summary = main.k_fold_cross_validation("CustomConvNeXt", train, k_folds=3)
    assert summary["k_folds"] == 3 and summary["mean_accuracy"] == mean
    results = main.run_full_pipeline()
    figures = results["CustomConvNeXt"]
    assert figures["test_accuracy"] <= 1 and "checkpoint" in figures["exported_formats"]
    print("called")
"""


def test_the_three_functions(synthetic, tmp_path):
    shutil.copytree(synthetic / "split_dataset", tmp_path / "w" / "split_dataset")
    script = tmp_path / "calls.py"
    script.write_text(CALLS.format(src=str(PROJECT / "BASE-BACK" / "src")))
    settings = {
        **{"DBT_BASE_DIR": str(tmp_path / "w"), "DBT_MODEL_SIZE": "tiny", "DBT_BACKBONES": "CustomConvNeXt"},
        **{"DBT_EPOCHS_HEAD": "0", "DBT_EPOCHS_FINETUNE": "1", "DBT_K_FOLDS": "3", "DBT_AUGMENT": "none"},
    }
    done = run_python(str(script), environment=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "called"


def test_help_needs_no_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(PROJECT / 'BASE-BACK' / 'src')!r}); import main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit: assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--epochs-finetune" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="uses fork")
def test_the_test_split_is_not_folded(trained):
    import importlib.util

    spec = importlib.util.spec_from_file_location("base_main", PROJECT / "BASE-BACK" / "src" / "main.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path

    class Foreign:
        root = trained / "Data"

    with pytest.raises(ValueError, match="folds are made of the train split alone"):
        module.k_fold_cross_validation("CustomConvNeXt", Foreign())
