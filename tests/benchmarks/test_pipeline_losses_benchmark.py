"""The benchmark of log-losses beside another commit: which images are val and test, and when the goal is missed."""

from __future__ import annotations

import subprocess

import pipeline_losses
import pytest

IMAGES = [f"{label}/{number:02d}.png" for label in "ab" for number in range(10)]
SAMPLES = {"train": IMAGES[:4] + IMAGES[10:15], "val": IMAGES[4:6] + IMAGES[15:16], "test": IMAGES[6:7]}


def test_val_and_test_are_all_images_that_no_member_saw():
    val, test = pipeline_losses.draw(SAMPLES, IMAGES, 0)
    assert sorted(SAMPLES["train"] + val + test) == IMAGES
    assert sorted(name[0] for name in val) == ["a", "a", "b"]
    assert {name[0] for name in test[:6]} == {"a", "b"}
    assert pipeline_losses.draw(SAMPLES, IMAGES, 0) == (val, test)
    assert pipeline_losses.draw(SAMPLES, IMAGES, 1)[0] != val


def turns(*losses):
    """One entry of each version for each pair of losses."""
    return [
        {
            "version": version,
            "turn": turn,
            "recommended": "b",
            "log_loss": loss,
            "losses": {"b": loss, "one_soup": loss},
        }
        for turn, pair in enumerate(losses)
        for version, loss in zip(("here", "before"), pair, strict=True)
    ]


@pytest.mark.parametrize(
    ("losses", "holds"),
    [
        (((0.30, 0.20), (0.31, 0.20)), False),
        (((0.30, 0.20), (0.31, 0.40)), True),
        (((0.20, 0.30), (0.20, 0.31)), True),
        (((0.20, 0.19),), False),
        (((0.20, 0.20),), True),
    ],
)
def test_the_goal_is_missed_where_losses_are_clearly_higher(losses, holds):
    found = pipeline_losses.rows(turns(*losses), "before")
    assert [entry["what"] for entry in found] == ["test log-loss of the recommended", "test log-loss of b"]
    assert [entry["holds"] for entry in found] == [holds, None]
    assert found[0]["peer"] == f"{sum(there for _, there in losses) / len(losses):.4f} at before"


def test_without_the_other_commit_nothing_is_judged():
    found = pipeline_losses.rows([entry for entry in turns((0.3, 0.2)) if entry["version"] == "here"], "before")
    assert [(entry["figure"], entry["holds"], entry["peer"]) for entry in found] == [(0.3, None, None)] * 2


def test_a_commit_that_git_does_not_have_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_losses.pipeline, "PROJECT", tmp_path)
    assert not pipeline_losses.has_commit("HEAD")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=name", "-c", "user.email=name@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    assert pipeline_losses.has_commit("HEAD")
    assert not pipeline_losses.has_commit("2d52cc4")
