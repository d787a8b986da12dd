"""The source of an export, its signature and their digest."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.core.errors import UserError
from utils.ensemble_methods import HardVoting, SoftVoting
from utils.exporting.exported_network import (
    FLOAT_NCHW,
    UINT8_NHWC,
    ExportSignature,
    ExportSource,
    assemble_network,
    describe_network,
    require_member_limit,
    source_digest,
)
from utils.networks.ensemble_network import by_resize_rule
from utils.networks.preprocessing import Preprocessing
from utils.predictions.catalog import IMPORTED, Member


def member(name: str, **values) -> Member:
    facts = {"architecture": "A", "size": "tiny", "img_size": 32, "source": "trained", "digest": name * 3}
    made = object.__new__(Member)
    for key, value in ({"name": name, "classes": ("a", "b")} | facts | values).items():
        object.__setattr__(made, key, value)
    return made


def source_of(*members: Member, combiner=None) -> ExportSource:
    return ExportSource("it", "soft_voting", members, ("a", "b"), combiner, "full", "digest")


def test_a_limit_on_members_is_refused_only_where_it_is_exceeded():
    source = source_of(member("x"), member("y"))
    require_member_limit(source, None)
    require_member_limit(source, 2)
    with pytest.raises(UserError, match="2 members, --max-members allows 1"):
        require_member_limit(source, 1)


def test_discontinuities_are_those_of_the_combiner():
    assert not source_of(member("x")).is_discontinuous
    assert not source_of(member("x"), combiner=SoftVoting()).is_discontinuous
    assert source_of(member("x"), combiner=HardVoting()).is_discontinuous


def test_the_digest_depends_on_members_classes_and_signature():
    source, signature = source_of(member("x"), combiner=SoftVoting()), ExportSignature()
    digests = {
        source_digest(source, signature),
        source_digest(source, ExportSignature(UINT8_NHWC)),
        source_digest(source, signature, "dynamo"),
        source_digest(source, ExportSignature(member_probabilities=True)),
        source_digest(replace(source, members=(member("x", digest="other"),)), signature),
        source_digest(replace(source, classes=("b", "a")), signature),
        source_digest(replace(source, inputs_digest="other"), signature),
    }
    assert len(digests) == 7
    assert source_digest(replace(source), ExportSignature()) in digests


def test_imported_members_are_exported_as_their_combiner_alone():
    source = source_of(member("x", source=IMPORTED), member("y", source=IMPORTED), combiner=SoftVoting())
    network = assemble_network(None, source, ExportSignature())
    logits = np.random.default_rng(0).normal(size=(5, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(
        network(torch.from_numpy(logits)).numpy(),
        source.combiner.predict_proba(logits.transpose(1, 0, 2)),
        atol=1e-6,
    )
    description = describe_network(source, ExportSignature(), network, "digest")
    assert description["input"]["shape"] == [None, 2, 2]
    assert description["input"]["kind"] == "member-logits"
    assert (description["jumps"], description["outputs"]) == (False, ["probabilities"])


def described(*members: Member, kind: str = FLOAT_NCHW) -> dict:
    """`input` of the metadata; the network is replaced by the names of its inputs and its image size."""
    groups = by_resize_rule(each.image_preprocessing for each in members)
    is_one = kind == UINT8_NHWC or len(groups) == 1
    names = ("images",) if is_one else tuple(f"images_{n + 1}" for n in range(len(groups)))
    network = SimpleNamespace(input_names=names, output_names=("probabilities",), img_size=groups[-1][0].input_size)
    return describe_network(source_of(*members, combiner=SoftVoting()), ExportSignature(kind), network, "digest")[
        "input"
    ]


def other(name: str, **changes) -> Member:
    record = replace(Preprocessing.of_base_pipeline(32), source="timm", **changes).as_record()
    return member(name, preprocessing=record, img_size=record["input_size"])


def test_one_resize_rule_is_described_as_before_with_its_rule():
    given = described(member("x"), member("y"))
    (entry,) = given.pop("inputs")
    assert given == {
        "kind": "float-nchw",
        "name": "images",
        "dtype": "float32",
        "shape": [None, 3, 32, 32],
        "range": [0, 1],
        "img_size": 32,
        "shorter_side": 36,
        "resampling": "Pillow bilinear, then the centre square",
        "normalised_inside": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    assert (entry["name"], entry["resizing"]["resized"], entry["resizing"]["resize"]) == ("images", 36, "shorter-side")
    assert "normalised_inside" not in described(member("x"), other("y", mean=(0.5, 0.5, 0.5)))


def test_several_resize_rules_are_inputs_of_their_own():
    given = described(other("x", input_size=48, resize="squash", resized=48), member("y"), other("z", resize="pad"))
    assert [entry["name"] for entry in given["inputs"]] == ["images_1", "images_2", "images_3"]
    assert [entry["shape"] for entry in given["inputs"]] == [[None, 3, 32, 32]] * 2 + [[None, 3, 48, 48]]
    assert [entry["resizing"]["resize"] for entry in given["inputs"]] == ["shorter-side", "pad", "squash"]
    assert given["inputs"][1]["resizing"]["fill"] == [124, 116, 104]
    assert not {"name", "shape", "img_size", "shorter_side"} & given.keys()
    assert "inputs" in json.loads(json.dumps(given))


def test_decoded_images_are_one_input():
    given = described(member("x"), other("y", interpolation="bicubic"), kind=UINT8_NHWC)
    (entry,) = given["inputs"]
    assert (given["name"], entry["shape"], entry["exif"]) == ("images", [None, None, None, 3], "ignore")
    assert [rule["interpolation"] for rule in entry["resized_inside"]] == ["bilinear", "bicubic"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resize": "pad"}, "y pads images"),
        ({"interpolation": "nearest"}, "y resizes by nearest interpolation"),
        ({"exif": "apply"}, "y differs from another member in whether the EXIF orientation is applied"),
    ],
)
def test_a_rule_that_the_files_cannot_follow_inside_is_named(changes, reason):
    source = source_of(member("x"), other("y", **changes), combiner=SoftVoting())
    with pytest.raises(UserError, match=rf"{reason} \(32 px .*--input float-nchw"):
        assemble_network(None, source, ExportSignature(UINT8_NHWC))
