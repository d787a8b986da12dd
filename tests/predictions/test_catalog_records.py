"""The schema of a catalog on disk: what is accepted, and which entry a refusal names."""

from __future__ import annotations

from copy import deepcopy

import pytest

from utils.networks.preprocessing import Preprocessing
from utils.predictions import catalog_records

BASE_64 = Preprocessing.of_base_pipeline(64).as_record()
MEMBER = {
    "source": "trained",
    "architecture": "CustomConvNeXt",
    "size": "tiny",
    "img_size": 32,
    "classes": ["ant", "bee"],
    "checkpoints": [{"path": "checkpoints/a_final.pth", "stage": "final", "sha256": "0" * 64}],
    "exports": [],
    "metrics": None,
    "oof": None,
    "recorded_accuracy": 0.9,
    "digest": "0" * 64,
    "usable": True,
    "parents": [],
}
RECORD = {
    "base_back": {"path": "BASE-BACK", "kind": "bundled", "digest": "0" * 64},
    "classes": ["ant", "bee"],
    "splits": {split: {"n": 4, "digest": "0" * 64} for split in ("train", "val", "test")},
    "members": {"a": MEMBER},
    "problems": [],
}


def changed(*keys, value):
    record = deepcopy(RECORD)
    part = record
    for key in keys[:-1]:
        part = part[key]
    if value is None:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    return record


def test_a_catalog_and_one_with_entries_of_a_later_version_pass():
    catalog_records.check(RECORD)
    catalog_records.check(changed("members", "a", "added_later", value=1))


@pytest.mark.parametrize(
    ("record", "entry"),
    [
        (changed("classes", value=None), "classes"),
        (changed("splits", "val", value=None), "splits: no val"),
        (changed("members", "../a", value=MEMBER), "members"),
        (changed("members", "a", "source", value="guessed"), "members.a.source"),
        (changed("members", "a", "img_size", value="32"), "members.a.img_size"),
        (changed("members", "a", "checkpoints", value=[]), "members.a: no checkpoint"),
        (changed("members", "a", "classes", value=["ant", "cat"]), "members.a: other classes"),
        (changed("members", "a", "checkpoints", 0, "path", value="a\0b"), "members.a.checkpoints.0.path"),
        (changed("members", "a", "preprocessing", value={"resize": "squash"}), "members.a.preprocessing"),
        (changed("members", "a", "preprocessing", value=BASE_64), "members.a: preprocessing.input_size differs"),
    ],
)
def test_a_refusal_names_the_entry(record, entry):
    with pytest.raises(ValueError, match=entry.replace(".", r"\.")):
        catalog_records.check(record)


def test_members_that_cannot_be_used_may_have_other_classes():
    record = changed("members", "a", "classes", value=["ant", "cat"])
    record["members"]["a"]["usable"] = False
    catalog_records.check(record)
