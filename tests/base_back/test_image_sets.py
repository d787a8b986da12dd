"""Image sets as people have them: class folders, given splits and manifests become a split, or are refused whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, run_python
from image_folders import write_class_folders, write_manifest, write_photo
from stored_predictions import workspace_at

from utils.core.config_file import load_config
from utils.image_sets import open_image_set
from utils.predictions import catalog, folds, image_splits
from utils.predictions.row_groups import row_groups
from utils.predictions.store import Store
from utils.samples import recorded_groups, scan
from utils.splitting import SplitError, prepare_optimized_datasets, read_manifest

SPLITS = ("train", "val", "test")


def split(source: Path, workspace: Path) -> dict[str, list[str]]:
    """{split: sample ids} of a source that is split."""
    prepare_optimized_datasets(source, workspace / "split_dataset")
    return {name: [s.sample_id for s in scan(workspace / "split_dataset" / name)[1]] for name in SPLITS}


def refusal(source: Path, workspace: Path) -> str:
    """Why a source is refused; nothing of it is left behind."""
    with pytest.raises((SplitError, FileNotFoundError)) as caught:
        split(source, workspace)
    assert not workspace.exists()
    return str(caught.value).replace(str(source), "SOURCE")


def manifest_of(folder: Path, rows: list[str], columns: str = "file_name,label") -> Path:
    return write_manifest(folder, "\n".join([columns, *rows]) + "\n")


# folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Train", "valid", "Test"), ("train", "validation", "test")]
)
def test_given_splits_are_kept_and_linked(tmp_path, names):
    for place, name in enumerate(names):
        write_class_folders(tmp_path / "set" / name, ("a", "b"), 3 - place, first_seed=10 * place)
    samples = split(tmp_path / "set", tmp_path / "w")
    assert [len(samples[name]) for name in SPLITS] == [6, 4, 2]
    for name, given in zip(SPLITS, names, strict=True):
        for sample_id in samples[name]:
            link = tmp_path / "w" / "split_dataset" / name / sample_id
            assert link.readlink() == tmp_path / "set" / given / sample_id
    split(tmp_path / "set", tmp_path / "w")
    write_photo(tmp_path / "set" / names[1] / "a" / "new.png", 99)
    with pytest.raises(SplitError, match=rf"1 added, 0 removed, 0 changed \({names[1]}/a/new.png\)"):
        split(tmp_path / "set", tmp_path / "w")


@pytest.mark.parametrize(("given", "made"), [("test", ["val"]), ("val", ["test"]), (None, ["val", "test"])])
def test_a_missing_split_is_made_from_train_and_said(tmp_path, heard, given, made):
    write_class_folders(tmp_path / "set" / "train", ("a", "b"), 18)
    if given:
        write_class_folders(tmp_path / "set" / given, ("a", "b"), 5, first_seed=100)
    samples = split(tmp_path / "set", tmp_path / "w")
    assert [len(samples[name]) for name in made] == [4] * len(made)
    assert len(samples["train"]) == 36 - 4 * len(made)
    if given:
        assert samples[given] == [f"{name}/{number}.png" for name in "ab" for number in range(5)]
    words = ", ".join(f"{name} (4 images)" for name in made)
    assert f"the images have no {' and no '.join(made)}, made from train: {words}" in heard.text


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    write_class_folders(tmp_path / "set", ("bus", "train"), 10)
    write_photo(tmp_path / "set" / "train" / "unsorted" / "1.png", 99)
    assert {i.split("/")[0] for i in split(tmp_path / "set", tmp_path / "w")["train"]} == {"bus", "train"}
    assert not next((tmp_path / "w").rglob("*.png")).is_symlink()


def two_names_of_val(source):
    for name in ("train", "val", "valid"):
        write_class_folders(source / name, ("a", "b"), 2)


def a_class_in_test_alone(source):
    write_class_folders(source / "train", ("cat", "dog"), 5)
    write_class_folders(source / "test", ("cat", "dogs"), 5)


def a_test_without_labels(source):
    write_class_folders(source / "train", ("a", "b"), 5)
    write_class_folders(source, ("test",), 3)


def one_level_down(source):
    write_class_folders(source / "Data", ("a", "b", "c"), 3)
    (source / "readme.txt").touch()


def two_levels_down(source):
    write_class_folders(source / "set" / "images", ("a", "b"), 3)


def images_of_one_class(source):
    write_class_folders(source.parent, (source.name, "other"), 3)


def a_manifest_inside(source):
    manifest_of(source, ["1.png,a", "2.png,b"])


def images_below_the_class_folders(source):
    write_class_folders(source, ("a",), 3)
    write_class_folders(source / "b", ("deep",), 3)


def nothing(source):
    source.mkdir()


def another_file(source):
    source.write_bytes(b"PK")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (two_names_of_val, "SOURCE: both val and valid stand for val; expected one of them"),
        (a_class_in_test_alone, "class 'dog' is in train and not in test (did you mean 'dogs'?)"),
        (a_test_without_labels, "SOURCE/test: 3 image(s) and no class folder; expected the class folders of train"),
        (one_level_down, "SOURCE: no image in its 1 folder (Data); did you mean SOURCE/Data (3 class folders)?"),
        (two_levels_down, "did you mean SOURCE/set/images (2 class folders)?"),
        (images_of_one_class, "SOURCE: 3 images and no class folder; did you mean"),
        (a_manifest_inside, "did you mean the manifest SOURCE/metadata.csv?"),
        (images_below_the_class_folders, "SOURCE/b: the class folder holds no image itself; images are in deep below"),
        (nothing, "SOURCE: neither class folder nor image. Expected a folder with one folder of images per class"),
        (another_file, "SOURCE: a file that is no CSV manifest. Expected"),
    ],
)
def test_a_wrong_place_is_refused_with_the_right_one_and_leaves_nothing(tmp_path, make, words):
    make(tmp_path / "in" / "source") if make is images_of_one_class else make(tmp_path / "source")
    source = tmp_path / "in" / "source" if make is images_of_one_class else tmp_path / "source"
    assert words in refusal(source, tmp_path / "w")


def test_a_misspelt_folder_is_guessed(tmp_path):
    write_class_folders(tmp_path / "leaves", ("a", "b"), 3)
    assert f"did you mean {tmp_path / 'leaves'}?" in refusal(tmp_path / "leafes", tmp_path / "w")


@pytest.mark.parametrize(("folder", "words"), [("set", "(2 class folders)?"), ("set/Data", "has 2 readable image(s)")])
def test_the_command_line_leaves_no_workspace_of_a_wrong_folder(tmp_path, folder, words):
    write_class_folders(tmp_path / "set" / "Data", ("a", "b"), 2)
    program = str(PROJECT / "BASE-BACK" / "src" / "main.py")
    done = run_python(program, "--data", str(tmp_path / folder), "--workspace", str(tmp_path / "w"))
    assert done.returncode == 1
    assert words in done.stderr
    assert not (tmp_path / "w").exists()


# manifests -----------------------------------------------------------------------------------------------------------


def test_a_manifest_is_split_by_groups_and_linked(tmp_path):
    rows = [f"{label}/{n}.png,{label},{label}{n // 3}" for label in "ab" for n in range(30)]
    source = manifest_of(tmp_path / "set", rows, "file_name,label,group")
    samples = split(source, tmp_path / "w")
    assert sum(len(ids) for ids in samples.values()) == 60
    groups = recorded_groups(tmp_path / "w" / "split_dataset")
    assert all(len(ids) % 3 == 0 and len(set(groups[name].values())) == len(ids) // 3 for name, ids in samples.items())
    assert all(path.is_symlink() for path in (tmp_path / "w" / "split_dataset").glob("*/*/*.png"))
    assert samples == split(source, tmp_path / "w")


def test_given_splits_of_a_manifest_are_kept(tmp_path):
    names = {"train": 4, "valid": 2, "test": 1}
    rows = [f"{s}{n}{label}.png,{label},{s}" for s, count in names.items() for n in range(count) for label in "ab"]
    samples = split(manifest_of(tmp_path / "set", rows, "file_name,label,split"), tmp_path / "w")
    assert [len(samples[name]) for name in SPLITS] == [8, 4, 2]
    assert all("/valid" in sample_id for sample_id in samples["val"])


def test_other_labels_splits_or_groups_of_the_same_images_are_another_set(tmp_path):
    rows = [f"{label}{n}.png,{label},g{label}{n}" for label in "ab" for n in range(9)]
    source = manifest_of(tmp_path / "set", rows, "file_name,label,group")
    split(source, tmp_path / "w")
    source.write_text(source.read_text().replace("ga0", "ga1"))
    with pytest.raises(SplitError, match=r"0 added, 0 removed, 0 changed \(labels, splits or groups were edited\)"):
        split(source, tmp_path / "w")


def test_equal_images_with_other_labels_are_refused_by_both_lines(tmp_path):
    source = manifest_of(tmp_path / "set", [f"{label}{n}.png,{label}" for n in range(4) for label in "ab"])
    shutil.copy(tmp_path / "set" / "a1.png", tmp_path / "set" / "b2.png")
    words = "SOURCE, line 7: 'b2.png' has the label 'b'; the equal image 'a1.png' of line 4 has 'a'. Expected one label"
    assert words in refusal(source, tmp_path / "w")


@pytest.mark.parametrize(
    ("columns", "rows", "words"),
    [
        ("", [], "class 'b' has 2 readable image(s) in 2 group(s); expected at least 3, one for each of train, val"),
        (
            ",split",
            ["train", "train", "val"],
            "class 'b' has 0 readable image(s) of val in 0 group(s); expected at least",
        ),
        (",group", ["g", "g", "g"], "class 'a' has 3 readable image(s) in 1 group(s)"),
    ],
)
def test_a_class_that_does_not_reach_every_split_is_refused(tmp_path, columns, rows, words):
    lines = [f"a{n}.png,a" for n in range(3)] + [f"b{n}.png,b" for n in range(2)]
    values = [*rows, *rows[:2]] or [""] * 5
    lines = [f"{line},{value}" if columns else line for line, value in zip(lines, values, strict=True)]
    message = refusal(manifest_of(tmp_path / "set", lines, f"file_name,label{columns}"), tmp_path / "w")
    assert words in message
    assert "or leave the rows of the class out" in message


def test_hard_links_stand_in_for_symbolic_ones(tmp_path, monkeypatch):
    source = manifest_of(tmp_path / "set", [f"{label}{n}.png,{label}" for label in "ab" for n in range(4)])
    monkeypatch.setattr(os, "symlink", lambda *_, **__: (_ for _ in ()).throw(OSError("no links here")))
    samples = split(source, tmp_path / "w")
    for name in SPLITS:
        for sample_id in samples[name]:
            original = tmp_path / "set" / sample_id.split("/")[1]
            assert (tmp_path / "w" / "split_dataset" / name / sample_id).samefile(original)


def test_links_to_images_that_are_gone_are_named(tmp_path):
    rows = [f"{label}{n}.png,{label}" for label in "ab" for n in range(8)]
    samples = split(manifest_of(tmp_path / "set", rows), tmp_path / "w")
    (tmp_path / "set" / samples["train"][0].split("/")[1]).unlink()
    link = tmp_path / "w" / "split_dataset" / "train" / samples["train"][0]
    with pytest.raises(ValueError, match=rf"{link}: a link to .*, which does not exist \(1 such link"):
        scan(link.parents[1])
    digests = workspace_at(tmp_path / "w").digests
    with pytest.raises(image_splits.UserError, match="which does not exist"):
        image_splits.list_images(tmp_path / "w" / "split_dataset", "train", image_splits.FileDigests(digests))


def test_broken_links_among_the_images_themselves_are_no_images(tmp_path):
    write_class_folders(tmp_path / "set", ("a", "b"), 6)
    (tmp_path / "set" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert sum(map(len, split(tmp_path / "set", tmp_path / "w").values())) == 12


def test_ignored_columns_and_groups_across_given_splits_are_said(tmp_path, heard):
    rows = [f"{s}{n}{label}.png,{label},{s},9" for s in SPLITS for n in range(2) for label in "ab"]
    source = manifest_of(tmp_path / "set", rows, "file_name,label,split,width")
    shutil.copy(tmp_path / "set" / "train0a.png", tmp_path / "set" / "test1a.png")
    split(source, tmp_path / "w")
    assert "ignored columns: width" in heard.text
    assert "1 set(s) of equal images or groups lie in more than one of the given splits" in heard.text


def test_files_of_suffixes_that_joined_later_do_not_change_an_earlier_split(tmp_path):
    write_class_folders(tmp_path / "set", ("a", "b"), 6)
    split(tmp_path / "set", tmp_path / "w")
    path = tmp_path / "w" / "split_dataset" / "split_manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["suffixes"]  # as it was written before there were others
    path.write_text(json.dumps(manifest))
    write_photo(tmp_path / "set" / "a" / "7.webp", 7)
    split(tmp_path / "set", tmp_path / "w")
    manifest["suffixes"] = [".png", ".webp"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(SplitError, match=r"1 added, 0 removed, 0 changed \(a/7.webp\)"):
        split(tmp_path / "set", tmp_path / "w")


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".TIFF", ".bmp", ".jpeg"])
def test_images_of_every_suffix_are_split(tmp_path, suffix):
    for place, name in enumerate("ab"):
        for number in range(4):
            write_photo(tmp_path / "set" / name / f"{number}{suffix}", 10 * place + number)
    assert sum(map(len, split(tmp_path / "set", tmp_path / "w").values())) == 8
    assert read_manifest(tmp_path / "w" / "split_dataset")["left_out"] == []


# to the orchestrator -------------------------------------------------------------------------------------------------


def test_from_a_manifest_to_a_catalog(tmp_path, base_main, orchestrator):
    labels = ("none", "mild", "severe")
    rows = [f"{n % 2}/{n // 2}-{label}.png,{label},{label}{n // 4}" for label in labels for n in range(40)]
    source = manifest_of(tmp_path / "set", rows, "file_name,label,group")
    (tmp_path / "set" / "labels.txt").write_text("\n".join(labels))
    workspace = tmp_path / "w"
    options = ("--size", "tiny", "--folds", "2", "--epochs-head", "0", "--epochs-finetune", "1")
    stages = ("--stages", "verify", "split", "kfold", "train")
    done = base_main(
        *(*options, *stages, "--backbones", "CustomConvNeXt", "--data", str(source)),
        workspace=workspace,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "w" / "split_dataset" / "train" / "none").is_dir()
    done = orchestrator("discover", workspace=workspace)
    assert done.returncode == 0, done.stderr
    config = load_config(PROJECT / "configs" / "votes.yaml")
    place = workspace_at(workspace)
    listed = catalog.read(place)
    assert listed.classes == labels
    member = listed.members["CustomConvNeXt"]
    assert member.classes == labels
    store = Store(config, place, listed)
    fold_of = folds.crossfit_folds(store)
    group_of = {
        (name, key): group for name, ids in recorded_groups(place.split_dir).items() for key, group in ids.items()
    }
    assert len({(group_of[key], fold) for key, fold in fold_of.items()}) == len({group_of[key] for key in fold_of})
    val_ids = np.array(store.samples("val").sample_ids)
    groups = row_groups(store, [("val", sample_id) for sample_id in val_ids])
    names = [group_of["val", sample_id] for sample_id in val_ids.tolist()]
    assert (
        len(set(zip(groups.tolist(), names, strict=True))) == len(set(names)) == len(set(groups.tolist())) < len(names)
    )
    oof = store.oof(member)
    oof_fold = dict(zip(oof.sample_ids.tolist(), oof.fold.tolist(), strict=True))
    pairs = {(group_of["train", sample_id], fold) for sample_id, fold in oof_fold.items()}
    assert len(pairs) == len({group for group, _ in pairs})


def test_more_folds_than_images_are_refused_at_once(tmp_path, base_main):
    rows = [f"{n}{label}.png,{label},g{label}{n // 2}" for label in "ab" for n in range(8)]
    source = manifest_of(tmp_path / "set", rows, "file_name,label,group")
    options = ("--size", "tiny", "--stages", "split", "kfold", "--folds", "7", "--data", str(source))
    done = base_main(*options, workspace=tmp_path / "w")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "folds need" in line]
    assert "--folds: 7 folds need as many images or groups of images; the train split has 4. Add images" in line


def test_a_folder_or_manifest_is_listed_the_same_way_twice(tmp_path):
    rows = [f"{label}{n}.png,{label}" for label in "ab" for n in range(4)]
    source = manifest_of(tmp_path / "set", rows)
    assert open_image_set(source).assignment_digest() == open_image_set(source).assignment_digest()
    source.write_text("\n".join(["file_name,label", *reversed(rows)]))
    assert open_image_set(source).assignment_digest() == open_image_set(source).assignment_digest()
