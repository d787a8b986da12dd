"""The command `audit` on workspaces of real photographs: what it prints, writes, and how it ends."""

from __future__ import annotations

import json
import shutil

import numpy as np
import page_outputs
import pytest
from in_process import run
from photo_crops import crops, write_split
from PIL import Image, ImageOps

from utils import base_back
from utils.auditing import audit_text


def planted(folder):
    """Eight photographs of two classes in train, and copies of two of them in val and test, one with another label."""
    photographs = crops()
    images = {f"train/{'ab'[number % 2]}/{number}.png": photographs[number] for number in range(8)}
    images |= {f"val/{name}/8{name}.png": photographs[8 + "ab".index(name)] for name in "ab"}
    images |= {f"test/{name}/9{name}.png": photographs[10 + "ab".index(name)] for name in "ab"}
    images["test/a/mirrored.png"] = ImageOps.mirror(photographs[0])
    images["val/b/smaller.png"] = photographs[2].resize((100, 100))
    return write_split(folder, images)


def audited(folder, *options: str):
    return run("audit", *options, "--json", "--quiet", workspace=folder)


def test_copies_across_splits_are_named_and_grouped(tmp_path):
    done = audited(planted(tmp_path))
    assert done.code == 0, done.stderr
    found = done.document["duplicates"]
    assert found["across_splits"] == 2
    assert found["with_different_labels"] == 1
    assert found["affected"] == {"val": ["val/b/smaller.png"], "test": ["test/a/mirrored.png"]}
    assert [group["images"] for group in found["groups"]] == [
        ["train/a/2.png", "val/b/smaller.png"],
        ["train/a/0.png", "test/a/mirrored.png"],
    ]
    assert {pair["relation"] for pair in found["pairs"]} == {"same image", "mirrored or turned"}
    assert done.document["next"].endswith(f"audit --write-split --workspace {tmp_path}")
    assert json.loads((tmp_path / "ensembles" / "audit.json").read_text())["duplicates"] == found


def test_strict_ends_with_3_after_everything_is_written(tmp_path):
    done = audited(planted(tmp_path), "--strict")
    assert done.code == 3
    assert "2 groups of copies are in more than one split" in done.stderr
    assert (tmp_path / "ensembles" / "audit.json").is_file()
    (tmp_path / "split_dataset" / "test" / "a" / "mirrored.png").unlink()
    (tmp_path / "split_dataset" / "val" / "b" / "smaller.png").unlink()
    assert audited(tmp_path, "--strict").code == 0


def test_the_base_pipeline_reads_the_clean_split_and_no_copy_is_left_across(tmp_path, base_main):
    done = run("audit", "--write-split", workspace=planted(tmp_path / "old"))
    assert "2 of 14 images move" in done.stdout
    manifest = tmp_path / "old" / "clean_split.csv"
    assert manifest.read_text().splitlines()[0] == "file_name,label,split,group"
    new = tmp_path / "new"
    made = base_main("--stages", "split", "--data", str(manifest), workspace=new)
    assert made.returncode == 0, made.stderr
    found = audited(new).document["duplicates"]
    assert found["across_splits"] == 0
    assert len(found["groups"]) == 2
    groups = base_back.load_bundled("samples").recorded_groups(new / "split_dataset")
    assert len(groups["train"]) == 4


def test_a_manifest_outside_of_the_images_is_refused(tmp_path):
    done = audited(planted(tmp_path / "w"), "--write-split", str(tmp_path / "elsewhere" / "split.csv"))
    assert done.code == 1
    assert "paths below its own folder" in done.stderr


def test_a_record_of_the_same_images_is_kept(tmp_path):
    audited(planted(tmp_path))
    path = tmp_path / "ensembles" / "audit.json"
    before = path.stat().st_mtime_ns
    assert audited(tmp_path).code == 0
    assert path.stat().st_mtime_ns == before
    assert audited(tmp_path, "--force").code == 0
    assert path.stat().st_mtime_ns > before


def test_one_image_is_audited(tmp_path):
    done = audited(write_split(tmp_path, {"train/a/only.png": crops()[0]}))
    assert done.code == 0, done.stderr
    assert done.document["duplicates"]["groups"] == done.document["probes"] == []
    assert done.document["notes"]["probes"] == "fewer than two classes"
    assert done.document["classes"][0]["images"] == {"train": 1}


def test_every_mode_is_read_and_damaged_and_empty_images_are_named(tmp_path):
    photograph = crops()[5]
    modes = {mode: photograph.convert(mode) for mode in ("RGB", "L", "LA", "RGBA", "P", "1")}
    modes["I;16"] = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16))
    write_split(tmp_path, {f"train/a/{mode.replace(';', '')}.png": image for mode, image in modes.items()})
    write_split(tmp_path, {"train/b/black.png": Image.new("RGB", (64, 64)), "train/b/whole.png": crops()[1]})
    damaged = tmp_path / "split_dataset" / "train" / "b" / "damaged.png"
    damaged.write_bytes((tmp_path / "split_dataset" / "train" / "b" / "whole.png").read_bytes()[:900])
    done = audited(tmp_path)
    assert done.code == 0, done.stderr
    assert [entry["image"] for entry in done.document["unreadable"]] == ["train/b/damaged.png"]
    assert done.document["nearly_empty"] == ["train/b/black.png"]
    copies = {name for group in done.document["duplicates"]["groups"] for name in group["images"]}
    assert {f"train/a/{mode}.png" for mode in ("RGB", "L", "LA", "RGBA", "P", "I16")} <= copies


def test_a_workspace_without_images_has_nothing_to_audit(tmp_path):
    done = audited(tmp_path)
    assert done.code == 0
    assert done.document["n"] == 0


def test_scores_without_the_affected_images_and_the_section_of_the_report(own_copy):
    test = own_copy / "split_dataset" / "test"
    copied = next(iter(sorted((test / "0").glob("*.png"))))
    source = next(iter(sorted((own_copy / "split_dataset" / "train" / "0").glob("*.png"))))
    ImageOps.mirror(Image.open(source)).save(copied)
    for command in (("discover",), ("build-ensemble",), ("evaluate",)):
        done = run(*command, "--config", "configs/votes.yaml", "--quiet", workspace=own_copy)
        assert done.code == 0, done.stderr
    found = audited(own_copy, "--config", "configs/votes.yaml").document
    affected = found["duplicates"]["affected"]["test"]
    assert f"test/0/{copied.name}" in affected
    scores = {entry["name"]: entry for entry in found["scores"]}
    for path in (own_copy / "metrics_output" / "ensembles").rglob("metrics.json"):
        record = json.loads(path.read_text())
        entry = scores[record["name"]]
        assert entry["all"]["n"] == record["n_samples"]
        assert entry["all"]["accuracy"] == pytest.approx(record["accuracy"], abs=1e-12)
        assert entry["without"]["n"] + entry["affected"]["n"] == entry["all"]["n"]
    page = (own_copy / "ensembles" / "report" / "index.html").read_text()
    assert 'id="audit"' in page
    assert "Scores without copies" in page
    shutil.copy(source, copied)  # other images: the section would be about those before
    assert run("discover", "--quiet", workspace=own_copy).code == 0


def test_the_guide_shows_lines_that_are_printed(tmp_path):
    done = run("audit", "--write-split", "--json", "--quiet", workspace=planted(tmp_path))
    record = dict(done.document)
    (shown,) = page_outputs.blocks("guides/audit.md")
    record["duplicates"]["with_different_labels"] = 7
    scores = {"accuracy": 0.9322, "log_loss": 0.1888}
    record |= {
        "recommended": {"name": "fusion_concat_mlp", "accuracy": 0.9322},
        "scores": [
            {
                "name": "fusion_concat_mlp",
                "affected": scores | {"n": 14},
                "all": scores | {"n": 59},
                "without": scores | {"n": 45},
            }
        ],
        "imbalance_ratio": 3.5,
        "label_issues": {"in_doubt": 11, "n": 537, "model": "fusion_concat_mlp"},
        "probes": [
            {"name": name, "accuracy": 0.748, "chance": 0.311, "stands_out": name != "file names"}
            for name in ("border pixels", "background colours", "file properties", "file names")
        ],
        "notes": {},
    }
    printed = [*audit_text.lines(record), *run("audit", "--write-split", workspace=tmp_path).stdout.splitlines()]
    assert page_outputs.not_printed(shown, "\n".join(printed), ()) == [], printed
