"""Candidates: which checkpoint of a backbone is the member, and which files are members of their own."""

from __future__ import annotations

from given_predictions import empty_workspace

from utils.discovery import candidates


def test_the_best_stage_is_the_member_and_derived_checkpoints_are_members_of_their_own(tmp_path):
    workspace = empty_workspace(tmp_path / "w")
    workspace.checkpoints.mkdir()
    for name in ("A_head_best", "A_finetune_best", "A_fold0", "A_snapshot1", "B_head_best", "notes"):
        (workspace.checkpoints / f"{name}.pth").touch()
    workspace.derived_checkpoints.mkdir(parents=True, exist_ok=True)
    for name in ("A_uniform_soup", "S_distilled"):
        (workspace.derived_checkpoints / f"{name}.pth").touch()
    found = {candidate.name: candidate for candidate in candidates.trained(workspace)}
    assert list(found) == ["A", "A_snapshot1", "A_uniform_soup", "B", "S_distilled"]
    assert (found["A"].stage, sorted(found["A"].others)) == ("finetune_best", ["fold0", "head_best", "snapshot1"])
    assert {name for name, candidate in found.items() if candidate.is_derived} == {
        "A_snapshot1",
        "A_uniform_soup",
        "S_distilled",
    }
    assert (found["A_uniform_soup"].parents, found["S_distilled"].parents) == (("A",), ())
