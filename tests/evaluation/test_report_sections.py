"""Values of the report's sections."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import PROJECT

from utils.core.config_file import load_config
from utils.evaluation import report_sections


def scores(accuracy, latency, size):
    return {
        **{"accuracy": accuracy, "size_mb": size},
        "latency_ms": None if latency is None else {"batch_1": {"p50": latency}, "device": "cpu", "threads": 2},
    }


def test_the_pareto_fronts_of_cost_leave_out_what_is_not_measured():
    metrics = {"fast": scores(0.7, 1.0, 9.0), "good": scores(0.9, 3.0, 9.0), "bad": scores(0.6, 3.0, None)}
    data = SimpleNamespace(metrics=metrics, evaluated=metrics["good"], focus="good")
    found = report_sections.cost(data)
    assert {row["name"]: row["front"] for row in found["rows"]} == {
        "fast": "latency",
        "good": "latency and size",
        "bad": report_sections.NONE,
    }
    assert found["device"] == "cpu, 2 threads"
    assert all(figure["svg"] for figure in found["figures"])


def test_cost_without_a_measurement_is_said_in_the_caption():
    metrics = {"imported": scores(0.7, None, None)}
    found = report_sections.cost(SimpleNamespace(metrics=metrics, evaluated=metrics["imported"], focus="imported"))
    assert [figure["svg"] for figure in found["figures"]] == ["", ""]
    assert all(figure["caption"].endswith("not measured.") for figure in found["figures"])


@pytest.mark.parametrize("value", ["[a,b]", "null", "true", "0.5"])
def test_overrides_of_the_configuration_are_typed_as_they_are_read(value):
    key = {"[a,b]": "backbones.exclude", "null": "cache.quota_gb", "true": "runs.moe.enable", "0.5": "seed"}[value]
    value = "7" if key == "seed" else value
    path = PROJECT / "configs" / "votes.yaml"
    changed = load_config(path, overrides=[f"{key}={value}"])
    options = report_sections.config_overrides(changed)
    assert load_config(path, overrides=options[1::2]).digest() == changed.digest()
