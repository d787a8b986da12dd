"""What the report says of learned ensembles: weights, verdicts, members per image, students."""

from __future__ import annotations

from types import SimpleNamespace

from page_records import write_view_choices
from report_pages import CONFIG, page_of, write_page

import report as synthetic_report
from utils.core.artifacts import read_json, write_json
from utils.evaluation.report import report_learned, report_page

MOE = {
    "expected_experts": 1.5,
    "is_fixed": False,
    "beside": {
        "itself": {"latency_ms": 2.0, "accuracy": 0.9},
        "all_experts": {"experts": 3.0, "latency_ms": 6.0, "accuracy": 0.91},
    },
}
SCORES = {"accuracy": 0.9, "log_loss": 0.3, "size_mb": 1.0}
STUDENT = SCORES | {
    "controls": {
        "alone": SCORES | {"accuracy": 0.8, "latency_ms": {"batch_1": {"p50": 1.5, "p95": 2.0}}},
        "teacher": SCORES | {"accuracy": 0.95, "name": "votes"},
    },
    "gain_kept": {"value": 2 / 3, "ci95": [0.25, None]},
    "notes": {"controls": "distillation helped"},
}
VERDICT = {"verdict": "beats soft_voting", "guards": {"soft_voting": {}}, "crossfit": {"log_loss": 0.25}}


def tables(records, metrics):
    nothing = {"workspace": None, "catalog": SimpleNamespace(members={})}
    return report_learned.learned(SimpleNamespace(records=records, metrics=metrics, **nothing))


def test_weights_stand_by_member_and_single_members_have_none():
    weights = {"one": {"a": 0.2, "b": 0.8}, "other": {"b": 0.5, "c": 0.5}, "soup": {"d": 1.0}, "trees": None}
    table = tables({name: {"weights": own} for name, own in weights.items()}, {})["weights"]
    assert table["names"] == ["b", "c", "a"]
    assert table["rows"] == [
        {"name": "one", "weights": ["80.0%", "-", "20.0%"]},
        {"name": "other", "weights": ["50.0%", "50.0%", "-"]},
    ]


def test_columns_of_many_members_are_cut(monkeypatch):
    monkeypatch.setattr(report_learned, "MAX_MEMBERS", 2)
    table = tables({"one": {"weights": {"a": 0.2, "b": 0.5, "c": 0.3}}}, {})["weights"]
    assert (table["names"], table["more"], table["rows"][0]["weights"]) == (["b", "c"], 1, ["50.0%", "30.0%"])


def test_sparse_ones_stand_beside_all_their_members():
    row = tables({"moe": MOE}, {"moe": {"members": ["a", "b", "c"]}})["sparse"][0]
    assert (row["experts"], row["latency"]) == ("1.50 of 3", "2.00 / 6.00")
    assert (row["accuracy"], row["note"]) == ("90.0% / 91.0%", "")
    assert tables({"moe": MOE | {"is_fixed": True}}, {"moe": {"members": []}})["sparse"][0]["note"]


def test_students_stand_beside_themselves_without_a_teacher_and_their_teacher():
    row = tables({}, {"student": STUDENT, "plain": SCORES})["students"]
    assert len(row) == 1
    assert row[0]["accuracy"] == ["90.0%", "80.0%", "95.0%"]
    assert row[0]["latency"] == ["1.50", "1.50", "not measured"]  # the student is the network alone
    assert (row[0]["teacher"], row[0]["kept"]) == ("votes", "67% [25%, unbounded]")
    nothing = STUDENT | {"gain_kept": None}
    assert tables({}, {"student": nothing})["students"][0]["kept"] == "-"


def test_views_stand_by_member_with_their_gain_as_long_as_the_networks_are_the_same(tmp_path):
    workspace = synthetic_report.synthetic(tmp_path)
    write_view_choices(workspace)
    write_page(workspace)
    text = page_of(workspace).text
    assert "Test-time augmentation" in text
    assert "Custom00 flip, five_crop 7 +0.0420 [+0.0100, +0.0740]" in text
    assert "Custom01 none 1 +0.0010 rotations would be chosen on all rows" in text
    assert "Custom02 none 1 - no out-of-sample rows" in text
    assert report_page.is_current(CONFIG, workspace, "test")
    for path in workspace.view_choices():
        write_json(path, read_json(path, remedy="") | {"networks": "of others"})
    assert not report_page.is_current(CONFIG, workspace, "test")
    write_page(workspace)
    assert "Test-time augmentation" not in page_of(workspace).text


def test_the_page_shows_them_and_leaves_the_part_out_without_any(tmp_path):
    workspace = synthetic_report.synthetic(tmp_path)
    names = sorted(path.name for path in workspace.models.iterdir())
    for name, more in zip(names, ({}, VERDICT, MOE), strict=False):
        path = workspace.ensemble(name) / "ensemble.json"
        write_json(path, read_json(path, remedy="") | more)
    path = workspace.ensemble_metrics(names[3], "test")
    write_json(path, read_json(path, remedy="") | {key: STUDENT[key] for key in ("controls", "gain_kept", "notes")})
    ranking = read_json(workspace.ranking("test"), remedy="")
    doubt = {"label_issues": {"model": names[0], "n": 300, "in_doubt": 7}}
    write_json(workspace.ranking("test"), ranking | doubt)
    write_page(workspace)
    text = page_of(workspace).text
    for words in (
        *(
            "Combination of the members",
            "beats soft_voting",
            "1.50 of 3",
            "67% [25%, unbounded]",
            "distillation helped",
        ),
        *("7 of 300 out-of-sample rows", "metrics_output/ensembles/label_issues.csv"),
    ):
        assert words in text, words
    (workspace.ensemble(names[4]) / "ensemble.json").write_text("{}")
    write_page(workspace)
    assert f"How {names[4]} combines its members is not shown" in page_of(workspace).text
    (workspace.ensemble(names[4]) / "ensemble.json").unlink()
    for name in [*names[:4], *names[5:]]:
        path = workspace.ensemble(name) / "ensemble.json"
        record = read_json(path, remedy="")
        gone = ("weights", "verdict", "guards", "expected_experts")
        write_json(path, {key: value for key, value in record.items() if key not in gone})
        path = workspace.ensemble_metrics(name, "test")
        write_json(path, {key: value for key, value in read_json(path, remedy="").items() if key != "controls"})
    write_page(workspace)
    assert "Combination of the members" not in page_of(workspace).text
