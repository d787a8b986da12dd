"""Values of the report's sections."""

from __future__ import annotations

import pytest
from conftest import PROJECT
from report_values import report_values

from utils.core.config_file import load_config
from utils.core.workspace import Workspace
from utils.evaluation.report import report_sections


def scores(accuracy, latency, size):
    return {
        **{"accuracy": accuracy, "size_mb": size, "n_samples": 60, "f1_macro": 0.9, "log_loss": 0.3, "ece": 0.1},
        "latency_ms": None if latency is None else {"batch_1": {"p50": latency}, "device": "cpu", "threads": 2},
    }


def test_the_pareto_fronts_of_cost_leave_out_what_is_not_measured():
    metrics = {"fast": scores(0.7, 1.0, 9.0), "good": scores(0.9, 3.0, 9.0), "bad": scores(0.6, 3.0, None)}
    found = report_sections.cost(report_values(metrics, "good"))
    assert {row["name"]: row["front"] for row in found["rows"]} == {
        "fast": "latency",
        "good": "latency and size",
        "bad": report_sections.NONE,
    }
    assert found["device"] == "CPU, 2 threads"
    assert all(figure["svg"] for figure in found["figures"])


def test_cost_without_a_measurement_is_said_in_the_caption():
    found = report_sections.cost(report_values({"imported": scores(0.7, None, None)}, "imported"))
    assert [figure["svg"] for figure in found["figures"]] == ["", ""]
    assert all(figure["caption"].endswith("not measured.") for figure in found["figures"])


def test_latencies_taken_on_a_busy_machine_are_marked(tmp_path):
    metrics = {"quiet": scores(0.7, 1.0, 9.0), "slowed": scores(0.9, 3.0, 9.0)}
    metrics["slowed"]["latency_ms"]["busy"] = 1.4
    workspace = Workspace(tmp_path, *(tmp_path / part for part in "abcdefg"))
    data = report_values(metrics, "slowed", workspace=workspace)
    found = report_sections.cost(data)
    assert {row["name"]: row["busy"] for row in found["rows"]} == {"quiet": False, "slowed": True}
    assert "Other programs used up to 1.4 cores while 1 model was timed" in found["busy"]
    assert "Remove ensembles/latency.json and evaluate again" in found["busy"]
    assert report_sections.cards(data)[4]["more"] == "CPU, 2 threads, measured on a busy machine"


@pytest.mark.parametrize("value", ["[a,b]", "null", "true", "0.5"])
def test_overrides_of_the_configuration_are_typed_as_they_are_read(value):
    key = {"[a,b]": "backbones.exclude", "null": "cache.quota_gb", "true": "runs.moe.enable", "0.5": "seed"}[value]
    value = "7" if key == "seed" else value
    path = PROJECT / "configs" / "votes.yaml"
    changed = load_config(path, overrides=[f"{key}={value}"])
    options = report_sections.config_overrides(changed)
    assert load_config(path, overrides=options[1::2]).digest() == changed.digest()
