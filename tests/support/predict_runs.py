"""Runs `predict` on a workspace and reads its rows."""

from __future__ import annotations

import os

import numpy as np
import pytest
from finished_workspace import CONFIG

from utils.core.config_file import load_config
from utils.inference.predict import predict

NAME = "soft_voting_ensemble"


def asked(workspace, *paths, model_name: str = NAME, overrides: tuple[str, ...] = (), **options):
    config = load_config(CONFIG, overrides=overrides)
    return predict(config, workspace, paths=[str(path) for path in paths], model_name=model_name, **options)


def by_id(records, folder) -> dict[str, dict]:
    return {os.path.relpath(record["path"], folder): record for record in records}


def stored(workspace, name: str = NAME) -> dict[str, np.ndarray]:
    with np.load(workspace.ensemble(name) / "predictions_test.npz") as arrays:
        return dict(arrays)


def compare(records, arrays) -> None:
    classes = arrays["classes"].tolist()
    assert len(records) == len(arrays["sample_ids"])
    for sample_id, expected in zip(arrays["sample_ids"].tolist(), arrays["probabilities"], strict=True):
        record = records[sample_id]
        assert record["class"] == classes[expected.argmax()]
        assert record["probability"] == pytest.approx(expected.max(), abs=1e-5)
        assert list(record["probabilities"]) == classes
        assert list(record["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
