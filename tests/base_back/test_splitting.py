"""The split of the base pipeline through its command line, on real files."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import write_digits

SPLITS = ("train", "val", "test")


@pytest.fixture
def workspace(tmp_path):
    write_digits(tmp_path / "Data", classes=(0, 1, 2), per_class=30)
    return tmp_path


def split(base_main, workspace, *options, **environment):
    return base_main("--stages", "split", "--size", "tiny", *options, workspace=workspace, environment=environment)


def manifest(workspace):
    return json.loads((workspace / "split_dataset" / "split_manifest.json").read_text())


def test_every_image_once_by_share_and_again_the_same(base_main, workspace, tmp_path_factory):
    assert split(base_main, workspace).returncode == 0
    samples = manifest(workspace)["samples"]
    assert [len(samples[name]) for name in SPLITS] == [72, 9, 9]
    assert len(set().union(*samples.values())) == 90
    for name in SPLITS:
        for sample_id in samples[name]:
            copy = workspace / "split_dataset" / name / sample_id
            assert copy.read_bytes() == (workspace / "Data" / sample_id).read_bytes()
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(workspace / "Data", other / "Data")
    assert split(base_main, other).returncode == 0
    assert {n: sorted(s) for n, s in manifest(other)["samples"].items()} == {n: sorted(s) for n, s in samples.items()}


def test_equal_images_and_groups_stay_in_one_split(base_main, workspace):
    first = sorted((workspace / "Data" / "0").iterdir())[0]
    for number in range(4):
        shutil.copy(first, workspace / "Data" / "0" / f"copy{number}.png")
    for number, file in enumerate(sorted((workspace / "Data" / "1").iterdir())):
        file.rename(file.with_name(f"patient{number // 5}_{number}.png"))
    done = split(base_main, workspace, DBT_GROUP_REGEX=r"^(patient\d+)_")
    assert done.returncode == 0
    found = manifest(workspace)
    place = {sample_id: name for name in SPLITS for sample_id in found["samples"][name]}
    copies = [sample_id for sample_id in place if "copy" in sample_id] + [f"0/{first.name}"]
    assert len({place[sample_id] for sample_id in copies}) == 1
    patients = {}
    for sample_id, name in place.items():
        if "patient" in sample_id:
            patients.setdefault(sample_id.split("_")[0], set()).add(name)
    assert len(patients) == 6
    assert all(len(names) == 1 for names in patients.values())
    assert sorted(found["repeated"][0]) == sorted(copies)


def test_an_unreadable_image_is_named_left_out_and_recorded(base_main, workspace):
    (workspace / "Data" / "0" / "broken.png").write_bytes(b"\x89PNG nonsense")
    done = split(base_main, workspace)
    assert done.returncode == 4
    assert "0/broken.png left out" in done.stderr
    assert [entry["path"] for entry in manifest(workspace)["left_out"]] == ["0/broken.png"]
    assert not list((workspace / "split_dataset").rglob("broken.png"))
    trained = base_main(
        *("--stages", "train", "--backbones", "CustomConvNeXt", "--size", "tiny"),
        *("--epochs-head", "0", "--epochs-finetune", "1"),
        workspace=workspace,
    )
    assert trained.returncode == 4
    assert "left out: 0/broken.png" in trained.stderr


def test_class_names_with_spaces_and_accents(base_main, tmp_path):
    write_digits(tmp_path / "Data", classes=(0, 1), per_class=12)
    (tmp_path / "Data" / "0").rename(tmp_path / "Data" / "tâche noire")
    (tmp_path / "Data" / "1").rename(tmp_path / "Data" / "健康 leaf")
    assert split(base_main, tmp_path).returncode == 0
    assert manifest(tmp_path)["classes"] == ["tâche noire", "健康 leaf"]


def test_a_split_of_other_images_is_not_reused_in_silence(base_main, workspace):
    assert split(base_main, workspace).returncode == 0
    assert split(base_main, workspace).returncode == 0
    extra = workspace / "Data" / "2" / "new.png"
    shutil.copy(sorted((workspace / "Data" / "1").iterdir())[0], extra)
    done = split(base_main, workspace)
    assert done.returncode == 1
    assert "1 added, 0 removed, 0 changed (2/new.png)" in done.stderr
    assert "move split_dataset away" in done.stderr


def remove_data(data):
    shutil.rmtree(data)


def leave_one_class(data):
    shutil.rmtree(data / "1")
    shutil.rmtree(data / "2")


def empty_a_class(data):
    for file in (data / "1").iterdir():
        file.unlink()


def starve_a_class(data):
    for file in sorted((data / "1").iterdir())[2:]:
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_data, "no such folder"),
        (leave_one_class, "found one class only ('0')"),
        (empty_a_class, "the class folder holds no image"),
        (starve_a_class, "class '1' has 2 readable image(s)"),
    ],
)
def test_data_that_cannot_be_split_is_refused_and_nothing_is_left(base_main, workspace, damage, words):
    damage(workspace / "Data")
    done = split(base_main, workspace)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace / "split_dataset").exists()
    assert not list(workspace.glob(".*partial*"))


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (("--backbones", "CustomConvNext"), {}, "did you mean CustomConvNeXt?"),
        ((), {"DBT_K_FOLDS": "many"}, "DBT_K_FOLDS: found 'many'; allowed: a whole number from 2"),
        ((), {"DBT_AUGMENT": "some"}, "allowed: full, no_flip, none"),
        ((), {"DBT_GROUP_REGEX": "("}, "a regular expression with exactly one group"),
    ],
)
def test_bad_settings_are_one_line_with_what_is_allowed(base_main, workspace, options, environment, words):
    done = split(base_main, workspace, *options, **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
