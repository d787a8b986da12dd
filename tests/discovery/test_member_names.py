"""New members' names follow one rule; older ones stay, are renamed with all that is theirs, and `clean` spares them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from given_predictions import content, write
from in_process import run
from named_members import VOTES, imported, stored

from utils.building import ensembles, meta_builder, snapshot_builder, soup_mixing
from utils.discovery.member_names import RESERVED
from utils.distillation import students

pytestmark = pytest.mark.usefixtures("few_folds")

RESERVED_NAMES = (
    *("soft_voting_ensemble", "Soft_Voting_Ensemble", "weighted", "stacking_lr", "stacking_svm", "fusion_concat_mlp"),
    *("meta_fuser", "moe", "cascade", "pruned_clustering", "uniform_soup_leaf", "leaf_uniform_soup", "leaf_distilled"),
    *("distilled_leaf", "leaf_snapshot3", "snapshot_ensemble", "members"),
)
MISSHAPEN = (
    "a.npz",
    "a.NPY",
    "leaf.pth",
    "leaf.onnx",
    "leaf.json",
    "blätter",
    "two words",
    "-leaf",
    "_leaf",
    "l" * 101,
)


def names(workspace: Path) -> list[str]:
    done = run("discover", "--json", "--quiet", workspace=workspace)
    assert done.code == 0, done.stderr
    return sorted(done.document["members"])


# clean ---------------------------------------------------------------------------------------------------------------


def test_clean_spares_a_member_whose_name_ends_like_a_file_s(tmp_path):
    workspace = imported(tmp_path, "a.npz", "forest")
    before = stored(workspace)
    gone = workspace / "ensembles" / "oof_predictions" / "a.npz"  # of a member `a` that is gone
    gone.write_bytes(b"123")
    done = run("clean", "--confirm", "--json", workspace=workspace)
    assert (done.code, done.document["removed"]) == (0, [str(gone)])
    assert stored(workspace) == before


def test_clean_takes_only_what_has_the_form_of_a_member_s_things(tmp_path):
    workspace = imported(tmp_path, "bayes", "forest")
    ours = workspace / "ensembles"
    for path in (ours / "predictions" / "notes.npz", ours / "oof_predictions" / "notes.txt"):
        path.write_bytes(b"a user's")
    before = stored(workspace)
    assert run("clean", "--confirm", "--json", workspace=workspace).document["removed"] == []
    assert stored(workspace) == before


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_clean_knows_nobody_s_things_by_a_readable_catalog_alone(tmp_path, damage):
    workspace = imported(tmp_path, "bayes", "forest")
    before = stored(workspace)
    damage(workspace / "ensembles" / "ensemble_catalog.json")
    assert run("clean", "--confirm", "--json", workspace=workspace).document["removed"] == []
    assert stored(workspace) == before


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RESERVED_NAMES, *MISSHAPEN])
def test_an_import_refuses_names_that_no_new_member_may_have(tmp_path, name):
    (tmp_path / "w").mkdir()
    done = run("import-predictions", "--from", write(tmp_path / "given", {name: 1, "b": 2}), workspace=tmp_path / "w")
    reason = "the name is reserved for ensembles" if name in RESERVED_NAMES else "expected a name"
    assert done.code == 1
    assert f"member {name!r}: {reason}" in done.stderr
    assert "Rename the folder (nothing was imported)" in done.stderr
    assert stored(tmp_path / "w") == {}


def test_an_import_refuses_names_that_differ_by_case_alone(tmp_path):
    workspace = imported(tmp_path, "bayes", "forest")
    before = stored(workspace)
    for number, given in enumerate(({"Bayes": 7}, {"tree": 7, "Tree": 8})):
        done = run("import-predictions", "--from", write(tmp_path / str(number), given), workspace=workspace)
        assert done.code == 1
        assert "of this workspace has that name but for upper and lower case" in done.stderr
    assert stored(workspace) == before


def test_members_of_before_the_rule_stay_are_named_and_can_be_imported_again(tmp_path):
    workspace = imported(tmp_path, "a.npz", "forest")
    done = run("discover", workspace=workspace)
    assert done.code == 0
    assert "a.npz: the name breaks the rule: expected a name that does not end in .npz, as files do" in done.stdout
    assert "Rename it: python ensemble_orchestrator.py discover --rename a.npz=NEW" in done.stdout
    again = run("discover", "--json", workspace=workspace).document["problems"]
    assert [problem["member"] for problem in again if problem["code"] == "member_name"] == ["a.npz"]
    done = run("import-predictions", "--from", write(tmp_path / "again", {"a.npz": 5}), workspace=workspace)
    assert done.code == 0, done.stderr
    assert names(workspace) == ["a.npz", "forest"]
    assert run("build-ensemble", *VOTES, workspace=workspace).code == 0


@pytest.mark.parametrize("name", ["soft_voting_ensemble", "leaf.pth", "LEAF", "bayes", "blätter"])
def test_a_declaration_refuses_them_as_well(own_copy, tmp_path, name):
    import timm

    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), file)
    assert run("discover", "--add", f"leaf=timm:test_resnet@{file}", "--quiet", workspace=own_copy).code == 0
    ids = [path.relative_to(own_copy / "split_dataset" / "val") for path in own_copy.glob("split_dataset/val/*/*")]
    (tmp_path / "given" / "bayes").mkdir(parents=True)
    logits = np.random.default_rng(0).normal(size=(len(ids), 4))
    labels = np.array([int(path.parts[0]) for path in ids])
    arrays = {"logits": logits + 3 * np.eye(4)[labels], "labels": labels, "sample_ids": np.array([*map(str, ids)])}
    np.savez(tmp_path / "given" / "bayes" / "val.npz", **arrays)
    done = run("import-predictions", "--from", tmp_path / "given", workspace=own_copy)
    assert done.code == 0, done.stderr
    before = (own_copy / "ensembles" / "ensemble_catalog.json").read_bytes()
    done = run("discover", "--add", f"{name}=timm:test_resnet@{file}", workspace=own_copy)
    assert done.code == 1
    assert f"--add {name}=timm:test_resnet@{file}: " in done.stderr
    assert "Choose another name" in done.stderr
    assert (own_copy / "ensembles" / "ensemble_catalog.json").read_bytes() == before


def test_every_name_that_a_method_takes_is_reserved():
    taken = [*ensembles.NAMES.values(), *ensembles.COMBINERS, meta_builder.NAME, snapshot_builder.NAME]
    taken += [f"{method.role}_leaf" for method in soup_mixing.METHODS.values()]
    taken += [f"leaf_{method.role}" for method in soup_mixing.METHODS.values()]
    taken += [students.ensemble_name("CustomMobileOne"), f"leaf_{students.ROLE}"]
    assert [name for name in taken if not RESERVED.fullmatch(name)] == []


# renaming ------------------------------------------------------------------------------------------------------------


def test_a_member_that_an_ensemble_hides_is_renamed_and_ranked(tmp_path):
    workspace = imported(tmp_path, "soft_voting_ensemble", "forest", "linear")
    assert run("build-ensemble", *VOTES, workspace=workspace).code == 0
    before = stored(workspace)
    done = run("discover", "--rename", "soft_voting_ensemble=mean", workspace=workspace)
    assert done.code == 0, done.stderr
    assert "renamed: soft_voting_ensemble is mean now; built with soft_voting_ensemble, so build again: " in done.stdout
    assert "hard_voting_ensemble, soft_voting_ensemble" in done.stdout
    assert names(workspace) == ["forest", "linear", "mean"]
    after = {
        Path(str(path).replace("mean", "soft_voting_ensemble", 1)): data for path, data in stored(workspace).items()
    }
    assert after.keys() == before.keys()
    arrays = [path for path in before if path.suffix in (".npy", ".npz")]
    assert all(after[path] == before[path] for path in arrays)
    states = run("status", "--json", *VOTES, workspace=workspace).document["ensembles"]
    assert states["hard_voting_ensemble"]["reasons"] == ["soft_voting_ensemble is no longer in the catalog"]
    assert run("clean", "--confirm", "--json", workspace=workspace).document["removed"] == []
    for command in ("build-ensemble", "evaluate"):
        done = run(command, *VOTES, workspace=workspace)
        assert done.code == 0, done.stderr
    rows = json.loads((workspace / "metrics_output" / "ensembles" / "ranking.json").read_text())["rows"]
    listed = sorted((row["kind"], row["name"]) for row in rows)
    assert listed == [
        *(("ensemble", "hard_voting_ensemble"), ("ensemble", "soft_voting_ensemble")),
        *(("member", "forest"), ("member", "linear"), ("member", "mean")),
    ]


def test_a_renamed_member_is_what_an_import_under_the_new_name_gives(tmp_path):
    workspace = imported(tmp_path / "one", "a.npz", "forest")
    assert run("discover", "--rename", "a.npz=a", workspace=workspace).code == 0
    other = imported(tmp_path / "two", "a", "forest")
    assert stored(workspace) == stored(other)
    members = [
        json.loads((one / "ensembles" / "ensemble_catalog.json").read_text())["members"] for one in (workspace, other)
    ]
    assert members[0] == members[1]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("gone=new", "gone is no network that was declared with --add, nor imported; these were: a.npz, forest"),
        ("a.npz", "expected OLD=NEW"),
        ("a.npz=forest", "an imported member of this workspace has that name"),
        ("a.npz=FOREST", "an imported member of this workspace has that name but for upper and lower case (forest)"),
        ("a.npz=moe", "the name is reserved for ensembles"),
        ("a.npz=b.npz", "expected a name that does not end in .npz"),
        ("a.npz=../b", "expected a name of a letter or a digit"),
        ("../a=b", "../a is no network"),
    ],
)
def test_a_renaming_that_cannot_be_followed_changes_nothing(tmp_path, asked, words):
    workspace = imported(tmp_path, "a.npz", "forest")
    before = content(workspace / "ensembles")
    done = run("discover", "--rename", asked, workspace=workspace)
    assert done.code == 1
    assert f"--rename {asked}: {words}" in done.stderr
    assert content(workspace / "ensembles") == before


def test_a_declared_network_is_renamed_with_its_predictions(own_copy, tmp_path):
    import timm

    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), file)
    assert run("discover", "--add", f"leaf=timm:test_resnet@{file}", "--quiet", workspace=own_copy).code == 0
    include = ("--set", "backbones.include=[leaf,CustomConvNeXt]", "--device", "cpu")
    assert run("build-ensemble", *VOTES, *include, workspace=own_copy).code == 0
    logits = own_copy / "ensembles" / "predictions" / "leaf" / "val" / "logits.npy"
    before = logits.read_bytes()
    fold = shutil.copy(
        own_copy / "checkpoints" / "CustomConvNeXt_fold0.pth", own_copy / "checkpoints" / "leaf_fold0.pth"
    )
    done = run("discover", "--rename", "leaf=tree", workspace=own_copy)
    assert (done.code, logits.read_bytes()) == (1, before)
    assert f"mv {fold} {Path(fold).with_name('tree_fold0.pth')}" in done.stderr
    Path(fold).rename(Path(fold).with_name("tree_fold0.pth"))
    done = run("discover", "--rename", "leaf=tree", "--json", workspace=own_copy)
    assert done.code == 0, done.stderr
    assert [entry["stage"] for entry in done.document["members"]["tree"]["checkpoints"]] == ["final", "fold0"]
    assert "leaf" not in done.document["members"]
    assert (own_copy / "ensembles" / "predictions" / "tree" / "val" / "logits.npy").read_bytes() == before
    assert not (own_copy / "ensembles" / "predictions" / "leaf").exists()
    done = run("discover", "--rename", "CustomConvNeXt=x", workspace=own_copy)
    assert done.code == 1
    assert "is renamed by its files" in done.stderr


def test_nothing_is_renamed_through_a_link(tmp_path):
    workspace = imported(tmp_path, "a.npz", "forest")
    folder = workspace / "ensembles" / "predictions" / "a.npz" / "val"
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    catalog = (workspace / "ensembles" / "ensemble_catalog.json").read_bytes()
    done = run("discover", "--rename", "a.npz=a", workspace=workspace)
    assert done.code == 1
    assert f"{folder}: a symbolic link to {tmp_path / 'elsewhere'}" in done.stderr
    assert (workspace / "ensembles" / "ensemble_catalog.json").read_bytes() == catalog
