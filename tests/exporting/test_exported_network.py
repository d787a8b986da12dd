"""The source of an export, its signature and their digest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from utils.core.errors import UserError
from utils.ensemble_methods import HardVoting, SoftVoting
from utils.exporting.exported_network import (
    UINT8_NHWC,
    ExportSignature,
    ExportSource,
    assemble_network,
    describe_network,
    require_member_limit,
    source_digest,
)
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
        source_digest(source, ExportSignature(member_probabilities=True)),
        source_digest(replace(source, members=(member("x", digest="other"),)), signature),
        source_digest(replace(source, classes=("b", "a")), signature),
        source_digest(replace(source, inputs_digest="other"), signature),
    }
    assert len(digests) == 6
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
    description = describe_network(source, ExportSignature(), network)
    assert description["input"]["shape"] == [None, 2, 2]
    assert description["input"]["kind"] == "member-logits"
    assert (description["jumps"], description["outputs"]) == (False, ["probabilities"])


def test_members_of_different_image_sizes_need_raw_images():
    source = source_of(member("x"), member("y", img_size=64), combiner=SoftVoting())
    with pytest.raises(UserError, match="--input uint8-nhwc"):
        assemble_network(None, source, ExportSignature())
