"""Shared by tests: helpers of test_combiner_battery that other test modules use as well."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from utils.combiners.protocol import MemberFacts
from utils.core.config import validate

M, N, C = 4, 60, 3


QUICK = validate(
    {
        "runs": {
            "stacking": {"mlp_config": {"hidden_dims": [8], "epochs": 4}, "xgb_config": {"n_estimators": 10}},
            "fusion": {"fusion_config": {"hidden_dims": [8], "epochs": 4}},
            "meta_fuser": {"fuser_type": "attention", "mlp_config": {"hidden_dims": [8], "epochs": 4}},
        }
    },
    source=Path("of the battery"),
)


FACTS = MemberFacts(("a", "b", "c", "d"), np.array([0.6, 0.7, 0.7, 0.5]), np.full(M, 10.0), np.full(M, 1.0))
