"""The defects of tests/support/mutations.py still fit the sources, and the page lists them all."""

from __future__ import annotations

import pytest
from conftest import PROJECT
from mutations import DEFECTS


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.what)
def test_a_defect_can_be_patched_in_and_its_test_exists(defect):
    assert (PROJECT / defect.file).read_text(encoding="utf-8").count(defect.old) == 1
    for word in defect.test.split(" -k ")[0].split():
        assert (PROJECT / word).exists()


def test_the_page_lists_every_defect():
    page = (PROJECT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert len(DEFECTS) >= 10
    assert [defect.what for defect in DEFECTS if f"| {defect.what} |" not in page] == []
