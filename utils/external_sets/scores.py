"""Records of the models on an external set, compared with their records on the workspace's test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.evaluation import evaluation_results, score_records
from utils.evaluation.evaluation_context import EvaluationContext
from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.evaluation.scoring import ScoredModel
from utils.external_sets import drop

SPLIT = "external"


def score(
    inputs: EvaluationInputs, test_inputs: EvaluationInputs, best_single: str | None, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """{model: `metrics.json`} of the named models, scored on both sides and compared with the same models."""
    sides = [_Side(each, best_single, names) for each in (inputs, test_inputs)]
    external, test = sides
    metrics = {}
    for name in names:
        record = score_records.metrics_record(external.models[name], external.context)
        test_record = score_records.metrics_record(test.models[name], test.context)
        record["split"] = SPLIT
        record["external"] = _beside_test(record, test_record, name, sides)
        metrics[name] = record
    return metrics


class _Side:
    """The models on the external set, or on the workspace's test split."""

    def __init__(self, inputs: EvaluationInputs, best_single: str | None, names: Sequence[str]) -> None:
        self.inputs = inputs
        self.models: dict[str, ScoredModel] = {model.name: model for model in inputs.models}
        references = evaluation_results.references(inputs, best_single)
        self.context = EvaluationContext(inputs, [self.models[name] for name in names], references)


def _beside_test(
    record: Mapping[str, Any], test_record: Mapping[str, Any], name: str, sides: Sequence[_Side]
) -> dict[str, Any]:
    """The entry `external` of `metrics.json`."""
    external, test = sides
    model, test_model = external.models[name], test.models[name]
    before, after = (
        drop.change(record["ece"], record["ci95"].get("ece"), test_record["ece"], test_record["ci95"].get("ece")),
        {
            "test": test.context.calibrated.ece(test_model),
            "external": external.context.calibrated.ece(model),
        },
    )
    return {
        "test_n": test_record["n_samples"],
        "drop": drop.changes(record, test_record),
        "classes": drop.class_changes(model, external.inputs, test_model, test.inputs),
        "calibration": {"temperature": record["calibration_temperature"], "ece": before, "calibrated_ece": after},
        "promises": drop.promises(record, test_record),
    }
