"""The workspace of a BASE-BACK that is not ours, as days of its training leave it: every file real, every fault real.

Ten digits, five small networks of the foreign package with 13 outputs each, trained and saved by its own functions in a
process of its own, which knows nothing of this project:

    CustomConvNeXt         head_best and final; the last epoch is worse than the best, which head_best holds
    CustomResNetMish       final alone; the metrics file has the best epoch's accuracy, whose weights nobody kept
    CustomSwinTransformer  final; an int64 buffer; K-fold figures without predictions; class_mapping.json
    CustomCoAtNet          head_best, finetune_best, final; placeholder names in class_mapping.json
    CustomDeiTStyle        two heads; killed before the end: head_best alone, no metrics

`expected/<backbone>.npz` beside the workspace has what the package's own `validate_epoch_optimized` says on test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import foreign_base_back

IMG_SIZE = 32
PER_CLASS = 50

TRAIN = """
import json, os, sys
from pathlib import Path

sys.dont_write_bytecode = True  # whatever a test finds there was written by what it runs
sys.path.insert(0, sys.argv[1])
expected = Path(sys.argv[2])

import numpy as np
import torch
from config.settings import (
    BACKBONES, CKPT_DIR, DEPLOY_DIR, IMG_SIZE, KFOLD_DIR, METRICS_DIR, NUM_CLASSES, TEST_DIR, TRAIN_DIR, VAL_DIR,
)
from models import create_custom_backbone_safe
from training import (
    create_optimized_optimizer, get_loss_function_for_backbone, save_checkpoint, train_epoch_optimized,
    validate_epoch_optimized,
)
from utils import logger, set_seed
from utils.datasets import (
    WindowsCompatibleImageFolder, create_optimized_dataloader, create_optimized_transforms, prepare_optimized_datasets,
)

torch.set_num_threads(1)
listed = Path.iterdir
Path.iterdir = lambda folder: iter(sorted(listed(folder)))  # the same split on every file system
prepare_optimized_datasets()
Path.iterdir = listed
plain = create_optimized_transforms(IMG_SIZE, is_training=False)
train, val, test = (WindowsCompatibleImageFolder(folder, plain) for folder in (TRAIN_DIR, VAL_DIR, TEST_DIR))
for dataset in (train, val, test):
    dataset.samples.sort()  # here and in the split it is not the file system that decides
loaders = [create_optimized_dataloader(dataset, 32, dataset is train, num_workers=0) for dataset in (train, val, test)]
state = {"completed_backbones": [], "results": {}, "timestamp": "2025-01-01T00:00:00"}
EPOCHS = 8

def scores(model, loader):
    return validate_epoch_optimized(model, loader, criterion)

for number, name in enumerate(BACKBONES):
    set_seed(42 + number)
    model = create_custom_backbone_safe(name, NUM_CLASSES)
    criterion = get_loss_function_for_backbone(name, NUM_CLASSES)
    optimizer = create_optimized_optimizer(model, 1e-2, name)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=EPOCHS)
    best, history = -1.0, []
    for epoch in range(EPOCHS):
        train_epoch_optimized(model, loaders[0], optimizer, criterion)
        schedule.step()
        accuracy = scores(model, loaders[1])[1]
        history.append(float(accuracy))
        if accuracy > best:
            best = accuracy
            extra = {"epoch": epoch, "accuracy": accuracy, "stage": "head"}
            save_checkpoint(CKPT_DIR / f"{name}_head_best.pth", model, optimizer, schedule, extra)
    if name == "CustomDeiTStyle":
        break  # the machine went down here
    if name == "CustomCoAtNet":
        extra = {"epoch": 0, "accuracy": scores(model, loaders[1])[1], "stage": "finetune"}
        save_checkpoint(CKPT_DIR / f"{name}_finetune_best.pth", model, optimizer, schedule, extra)
    if name in ("CustomConvNeXt", "CustomResNetMish"):
        # Last epochs whose learning rate is far too high.
        for rate in (0.1, 0.3, 1.0, 3.0):
            optimizer.param_groups[0]["lr"] = rate
            train_epoch_optimized(model, loaders[0], optimizer, criterion)
            if scores(model, loaders[1])[1] < best - 0.05:
                break
    figures = [float(value) for value in scores(model, loaders[1])[:5]]
    keys = ("final_val_loss", "final_accuracy", "final_precision", "final_recall", "final_f1_score")
    metrics = dict(zip(keys, figures)) | {
        "best_accuracy": max(history), "backbone_name": name, "epochs_head": EPOCHS, "epochs_finetune": 0,
        "visualization_paths": {"roc": "F:\\\\Disease Training\\\\plots_metrics\\\\" + name + ".tiff"},
        "visualization_summary": {},
    }
    save_checkpoint(CKPT_DIR / f"{name}_final.pth", model, extra=metrics)
    (METRICS_DIR / f"{name}_training_metrics.json").write_text(json.dumps(metrics, indent=2))
    tested = scores(model, loaders[2])
    names = ("test_loss", "test_accuracy", "test_precision", "test_recall", "test_f1")
    with_test = metrics | {key: float(value) for key, value in zip(names, tested)}
    state["completed_backbones"].append(name)
    state["results"][name] = {"accuracy": max(history), "metrics": with_test, "kfold_cv": None}
    ids = [Path(path).relative_to(TEST_DIR).as_posix() for path, _ in test.samples]
    np.savez(expected / f"{name}.npz", probabilities=tested[7], sample_ids=np.array(ids), accuracy=tested[1])
    logger.info(f"{name}: best {best:.3f}, final {figures[1]:.3f}")

for name in ("CustomResNetMish", "CustomSwinTransformer"):
    (CKPT_DIR / f"{name}_head_best.pth").unlink()  # three times the size of the weights
last = {"CustomCoAtNet": {"final_metrics": state["results"]["CustomCoAtNet"]["metrics"], "status": "success"}}
(METRICS_DIR / "pipeline_summary.json").write_text(json.dumps({"training_results": last}))
(CKPT_DIR / ".recovery_state.json").write_text(json.dumps(state))
kfold = {"backbone": "CustomSwinTransformer", "k_folds": 5, "fold_accuracies": [0.9] * 5, "mean_accuracy": 0.9,
         "std_accuracy": 0.0}
(KFOLD_DIR / "CustomSwinTransformer_kfold_results.json").write_text(json.dumps(kfold))
for name, classes in (("CustomSwinTransformer", train.classes), ("CustomCoAtNet", [f"class_{k}" for k in range(13)])):
    (DEPLOY_DIR / name).mkdir()
    mapping = {str(index): label for index, label in enumerate(classes)}
    (DEPLOY_DIR / name / "class_mapping.json").write_text(json.dumps(mapping))
"""


@dataclass(frozen=True)
class ForeignWorkspace:
    """Where everything of the foreign training lies."""

    base_back: Path
    workspace: Path
    expected: Path


def build(parent: Path) -> ForeignWorkspace:
    """Write the foreign package, split ten digits and train its networks; about ten seconds."""
    from conftest import write_digits

    workspace, expected, cwd = (parent / name for name in ("workspace", "expected", "cwd"))
    for folder in (workspace, expected, cwd):
        folder.mkdir()
    base_back = foreign_base_back.build(parent / "package", img_size=IMG_SIZE)
    write_digits(workspace / "Data", tuple(range(10)), PER_CLASS)
    script = parent / "train_everything.py"
    script.write_text(TRAIN.lstrip("\n"), encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DBT_", "BASE_BACK", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, str(script), str(base_back / "src"), str(expected)],
        cwd=cwd,
        env=clean | {"DBT_BASE_DIR": str(workspace), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (cwd / "training.log").is_file()  # as the public one does, wherever it is started
    return ForeignWorkspace(base_back, workspace, expected)
