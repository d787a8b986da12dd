"""Which members a configuration selects, on catalogs made by hand."""

from __future__ import annotations

import pytest
from conftest import PROJECT

from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.predictions.catalog import Catalog, Member, Problem
from utils.predictions.member_selection import select


def test_selected_members_that_cannot_be_used_are_named_with_the_first_error():
    members = {
        name: Member(name, "x", "full", 32, ("a", "b"), (), (), None, None, None, name, usable=name == "good")
        for name in ("bad", "good", "worse")
    }
    problems = (
        Problem("image_size", "info", "bad", "made for 32 px", "nothing to do"),
        Problem("classes", "error", "bad", "trained on the classes a, c", "train it on this split"),
        Problem("classes", "error", "worse", "trained on the class d", "train it on this split"),
    )
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=["backbones.include=[bad, worse]"])
    with pytest.raises(UserError) as error:
        select(Catalog({}, ("a", "b"), {}, members, problems), config)
    message = str(error.value)
    assert "none can be used (bad, worse): bad: trained on the classes a, c (train it on this split)" in message
    assert "python ensemble_orchestrator.py discover; or name others in backbones.include: good" in message
    assert "is in the catalog" not in message
