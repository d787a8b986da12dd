"""`clean` removes what it lists, and nothing else; the quota is kept before a command that decodes."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finished_workspace import CONFIG, clean, files, run, status, workspace

from utils.core import caches
from utils.core.config_file import load_config
from utils.core.errors import ConfigError, UserError
from utils.core.workspace import Workspace
from utils.discovery import discover
from utils.predictions import catalog

__all__ = ["workspace"]


def leave_rubbish(workspace: Workspace) -> dict[str, Path]:
    """One of each kind of thing that may go."""
    temporary = workspace.models / ".crossfit.abcd1234.partial.npz"
    temporary.write_bytes(b"12345")
    gone = workspace.predictions("Gone", "val")
    gone.mkdir(parents=True)
    np.save(gone / "logits.npy", np.zeros(10))
    workspace.embeddings("Gone", "val").parent.mkdir(parents=True)
    np.save(workspace.embeddings("Gone", "val"), np.zeros(10))
    workspace.oof("Gone").write_bytes(b"123")
    return {"temporary": temporary, "predictions": gone, "oof": workspace.oof("Gone")}


def test_clean_lists_and_removes_nothing_without_confirm(workspace):
    leave_rubbish(workspace)
    before = files(workspace.base)
    found = clean(workspace)
    assert found.document["removed"] == []
    assert files(workspace.base) == before
    groups = {group["what"]: group for group in found.document["groups"]}
    assert groups["temporary files"]["bytes"] == 5
    assert [item["name"] for item in groups["predictions of members that are gone"]["items"]] == [
        "Gone",
        "Gone",
        "Gone.npz",
    ]
    assert groups["decoded images"]["bytes"] > 0
    assert groups["decoded images"]["option"] == "--cache"
    assert found.next == "clean --confirm"
    assert "nothing is removed without --confirm" in found.text


def test_clean_confirm_removes_what_it_lists_and_nothing_else(workspace):
    before = files(workspace.base)
    leave_rubbish(workspace)
    found = clean(workspace, confirm=True)
    assert found.failures == []
    assert len(found.document["removed"]) == 4
    assert files(workspace.base) == before
    assert not (workspace.ensembles / "predictions" / "Gone").exists()
    assert status(workspace).next is None
    assert clean(workspace).text.endswith("nothing to remove")


def test_clean_temporary_removes_at_once_and_only_that(workspace):
    rubbish = leave_rubbish(workspace)
    base_own = workspace.checkpoints / ".x.abcd1234.partial.pth"
    base_own.write_bytes(b"the base pipeline's")
    training = workspace.distillation("distilled_x") / ".progress_student.abcd1234.partial.pth"
    training.parent.mkdir(parents=True)
    training.write_bytes(b"123")
    assert clean(workspace, temporary=True).document["bytes_removed"] == 8
    assert not rubbish["temporary"].exists()
    assert not training.exists()
    assert rubbish["predictions"].exists()
    assert base_own.exists()
    with pytest.raises(ConfigError, match="takes none"):
        clean(workspace, temporary=True, cache=True)


def test_what_cannot_be_removed_is_told_and_the_rest_goes(workspace, monkeypatch):
    rubbish = leave_rubbish(workspace)
    original = caches.remove

    def refusing(item):
        if item.name.endswith(".partial.npz"):
            raise PermissionError(errno.EACCES, "Permission denied")
        original(item)

    monkeypatch.setattr(caches, "remove", refusing)
    found = clean(workspace, confirm=True)
    (failure,) = found.failures
    assert failure.startswith(f"{rubbish['temporary']}: cannot be written (Permission denied)")
    assert len(found.document["removed"]) == 3
    assert not rubbish["predictions"].exists()


def test_a_folder_that_the_base_pipeline_writes_as_well_is_cleaned_of_what_is_old(workspace, tmp_path):
    """Our exports lie beside its own, unless there is an output; the decoded images are everybody's."""
    cached = workspace.image_cache / ".36_0123.abcd1234.partial.npy"
    exported = workspace.exports / ".metadata.abcd1234.partial.json"
    elsewhere = replace(workspace, output=tmp_path / "out")
    ours = elsewhere.exports / ".metadata.abcd1234.partial.json"
    ours.parent.mkdir(parents=True)
    for path in (cached, exported, ours):
        path.write_bytes(b"1")
    assert clean(workspace, temporary=True).document["removed"] == []
    assert clean(elsewhere, temporary=True).document["removed"] == [str(ours)]
    before = cached.stat().st_mtime - 4000
    os.utime(cached, (before, before))
    assert clean(workspace, temporary=True).document["removed"] == [str(cached)]
    assert exported.exists()


def test_folders_that_killed_exports_left_go_and_exports_stay(workspace):
    exports = workspace.exports
    for name in (".it.abcd1234.partial/it", ".it.abcd1234.partial/scratch", ".b.previous", "b", ".c.previous"):
        (exports / name).mkdir(parents=True)
    (exports / ".it.abcd1234.partial" / "it" / "weights").write_bytes(b"12345")
    (exports / ".other.abcd1234.partial" / "foreign").mkdir(parents=True)
    assert status(workspace).document["bytes"]["temporary"] == 5
    found = clean(workspace, temporary=True)
    assert found.document["removed"] == [str(exports / ".b.previous"), str(exports / ".it.abcd1234.partial")]
    assert sorted(path.name for path in exports.glob(".*")) == [".c.previous", ".other.abcd1234.partial"]
    assert (exports / "b").is_dir()


def test_clean_cache_and_stale_remove_what_can_be_made_again(workspace):
    shutil.copy(workspace.checkpoint("CustomConvNeXt", "snapshot1"), workspace.checkpoint("CustomConvNeXt", "final"))
    discover.discover(load_config(CONFIG), workspace)
    found = clean(workspace, cache=True, stale=True)
    assert found.next == "clean --cache --stale --confirm"
    assert "soft_voting_ensemble: stale: CustomConvNeXt has another checkpoint now" in found.text
    base = {name: content for name, content in files(workspace.base).items() if "image_cache" not in name}
    found = clean(workspace, cache=True, stale=True, confirm=True)
    assert found.failures == []
    assert list(workspace.models.iterdir()) == []
    assert list(workspace.image_cache.iterdir()) == []
    left = files(workspace.base)
    assert left == {name: content for name, content in base.items() if not name.startswith(str(workspace.models))}


def test_clean_never_goes_through_a_link(workspace, tmp_path):
    """Our folders moved to another disk by a link: what is there is listed as a link and stays."""
    leave_rubbish(workspace)
    for place in (workspace.all_predictions, workspace.models, workspace.image_cache):
        shutil.move(place, tmp_path / place.name)
        place.symlink_to(tmp_path / place.name)
    kept = {folder: files(tmp_path / folder.name) for folder in (workspace.all_predictions, workspace.image_cache)}
    found = clean(workspace, confirm=True, cache=True, stale=True)
    assert kept == {folder: files(tmp_path / folder.name) for folder in kept}
    assert (tmp_path / "models" / "soft_voting_ensemble" / "ensemble.json").is_file()
    assert found.text.count("symbolic link, not gone through") == 3
    assert not workspace.embeddings("Gone", "val").exists()  # not behind a link
    moved = shutil.move(workspace.ensembles, tmp_path / "all")
    workspace.ensembles.symlink_to(moved)
    np.save(Path(moved) / ".a.abcd1234.partial.npy", np.zeros(3))
    before = files(Path(moved))
    assert clean(workspace, temporary=True).document["removed"] == []
    assert files(Path(moved)) == before


def test_clean_without_a_catalog_cannot_tell_which_members_are_gone(workspace):
    rubbish = leave_rubbish(workspace)
    workspace.catalog.unlink()
    clean(workspace, confirm=True)
    assert rubbish["predictions"].exists()
    assert not rubbish["temporary"].exists()


def leave_progress(workspace: Workspace) -> dict[str, Path]:
    """Of a finished training, of one that is done again after it was finished, of one that nobody has finished."""
    workspace.training_progress.mkdir()
    found = {}
    for name in ("CustomConvNeXt_fold1", "CustomConvNeXt_train", "CustomMaxViT_train"):
        found[name] = workspace.training_progress / f"{name}.pth"
        found[name].write_bytes(b"12345")
    before = workspace.checkpoint("CustomConvNeXt", "fold1").stat().st_mtime - 1
    os.utime(found["CustomConvNeXt_fold1"], (before, before))
    return found


def test_progress_of_trainings_is_counted_and_only_what_a_finished_one_left_may_go(workspace):
    progress = leave_progress(workspace)
    assert status(workspace).document["bytes"]["training_progress"] == 15
    assert "15 B  training progress" in status(workspace).text
    assert clean(workspace, temporary=True).document["removed"] == []
    groups = {group["what"]: group for group in clean(workspace).document["groups"]}
    assert [item["name"] for item in groups["progress of finished trainings"]["items"]] == ["CustomConvNeXt_fold1.pth"]
    assert clean(workspace, confirm=True).document["removed"] == [str(progress["CustomConvNeXt_fold1"])]
    assert [path.exists() for path in progress.values()] == [False, True, True]


def test_a_damaged_recovery_state_is_named_and_one_of_another_pipeline_is_understood(workspace):
    leave_progress(workspace)
    workspace.recovery_state.write_text('{"completed_backbones": ["CustomConvNeXt"]}')
    assert clean(workspace, confirm=True).document["removed"] == []
    workspace.recovery_state.write_text("{")
    with pytest.raises(UserError, match=r"\.recovery_state\.json: damaged"):
        clean(workspace)


def test_progress_in_somebody_else_s_workspace_or_behind_a_link_stays(workspace, tmp_path):
    progress = leave_progress(workspace)
    assert clean(replace(workspace, output=tmp_path / "out"), confirm=True).document["removed"] == []
    moved = shutil.move(workspace.checkpoints, tmp_path / "elsewhere")
    workspace.checkpoints.symlink_to(moved)
    assert clean(workspace, confirm=True).document["removed"] == []
    assert all(path.exists() for path in progress.values())


def test_records_that_another_pipeline_s_k_fold_left_change_nothing(workspace):
    (workspace.kfold / "CustomConvNeXt_kfold_results.before.json").write_text('{"mean_accuracy": 0.5}')
    before = files(workspace.base)
    assert status(workspace).next is None
    assert clean(workspace, confirm=True).document["removed"] == []
    discover.discover(load_config(CONFIG), workspace)
    assert files(workspace.kfold) == {name: before[name] for name in before if name.startswith(str(workspace.kfold))}
    assert catalog.read(workspace).problems == ()


def test_the_quota_is_kept_before_a_command_that_decodes_and_told(own_copy):
    """Nothing is decoded again while every result is there."""
    packs = list((own_copy / "image_cache").glob("*.npz"))
    assert packs
    done = run(own_copy, "discover", "--set", "cache.quota_gb=0.0001")
    assert done.code == 0, done.stderr
    assert all(path.exists() for path in packs)  # decodes nothing, so it needs no room
    done = run(own_copy, "build-ensemble", "--set", "cache.quota_gb=0.0001")
    assert done.code == 0, done.stderr
    assert "more than the 0.0001 GB of cache.quota_gb" in done.stderr
    assert not any(path.exists() for path in packs)
    assert "up to date" in done.stdout
