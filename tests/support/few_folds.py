"""Three cross-fitting folds instead of five, for tests that do not depend on their number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from utils.predictions import folds


@pytest.fixture(scope="module")
def few_folds() -> Iterator[None]:
    """Nested fits of five folds took most of a build on few rows. With two, settings are selected on single rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folds, "CROSSFIT_FOLDS", 3)
        yield
