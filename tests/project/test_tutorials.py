"""The Python of the tutorials carried out as it stands: predictions of scikit-learn, imported, combined and read."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from in_process import run

TUTORIALS = PROJECT / "docs" / "tutorials"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (TUTORIALS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """The workspace of the tutorial on predictions, with the names that its code takes as given."""
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folder = tmp_path_factory.mktemp("tutorial")
    digits = load_digits(n_class=3)
    train, val, test = np.split(np.random.default_rng(0).permutation(len(digits.target)), [300, 420])
    ids = np.array([f"digit-{number}" for number in range(len(digits.target))])
    (folder / "predictions" / "forest").mkdir(parents=True)
    given = {
        "np": np,
        "StratifiedKFold": StratifiedKFold,
        "cross_val_predict": cross_val_predict,
        "model": RandomForestClassifier(20, random_state=0),
        **{"X": digits.data[train], "y": digits.target[train], "ids": ids[train]},
        **{"X_val": digits.data[val], "y_val": digits.target[val], "ids_val": ids[val]},
    }
    (block,) = blocks("predictions.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(block, given)
    model = given["model"]
    rows = {"labels": digits.target[test], "sample_ids": ids[test], "classes": model.classes_}
    np.savez(folder / "predictions/forest/test.npz", probabilities=model.predict_proba(digits.data[test]), **rows)
    workspace = folder / "work"
    workspace.mkdir()
    for line in (("import-predictions", "--from", str(folder / "predictions")), ("build-ensemble",), ("evaluate",)):
        settings = () if "--from" in line else ("--config", "configs/votes.yaml")
        done = run(*line, *settings, workspace=workspace)
        assert done.code == 0, done.stderr
    return workspace


def test_predictions_of_the_tutorial_are_ranked(imported):
    import ensemble_system as es

    workspace = es.open(imported)
    assert "forest" in [row["name"] for row in workspace.ranking()]
    assert workspace.metrics("forest")["accuracy"] > 0.9
    assert workspace.predictions("forest").sample_ids[0].startswith("digit-")


def test_the_python_of_the_tutorial_reads_a_workspace(built, tmp_path, monkeypatch, capsys):
    (block,) = blocks("python.md")
    image = next((built / "split_dataset" / "test" / "2").iterdir())
    (tmp_path / "work").symlink_to(built)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0001.jpg").symlink_to(image)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    printed = capsys.readouterr().out
    assert re.search(r"^\d+ of \d+ test images are wrong$", printed, re.MULTILINE)
    assert re.search(r"^photos/0001.jpg \S+ [\d.]+ None$", printed, re.MULTILINE), printed
