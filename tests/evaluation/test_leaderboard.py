"""The ranking as a table in a terminal and for papers."""

from __future__ import annotations

import csv
import io

import page_outputs
import pytest

from utils.evaluation import leaderboard

HELD = {
    **{"name": "b", "delta_accuracy": 0.1, "test": "mcnemar"},
    **{"p_value": 0.02, "p_value_holm": 0.04, "mcnemar_p": 0.02, "mcnemar_p_holm": 0.04},
}


def row(rank, name, **more):
    intervals = {metric: [0.1, 0.9] for metric in leaderboard.METRICS}
    scores = {"accuracy": 0.75, "f1_macro": 0.5, "log_loss": 1.25, "ece": 0.0625}
    marks = {"contaminated": rank is None, "optimistic": False}
    kind = {"rank": rank, "name": name, "kind": "ensemble", "ci95": intervals, "vs_best_single": HELD}
    return kind | scores | marks | more


@pytest.fixture
def ranking():
    evidence = {"rows": "oof+val", "n": 90, "log_loss": 0.4, "log_loss_ci95": [0.3, 0.5], "accuracy": 0.8}
    names = [row(1, "a_much_longer_name"), row(2, "b", vs_best_single=None, optimistic=True), row(None, "x_%$|<&")]
    return {
        "split": "test",
        "n": 30,
        "order": ["f1_macro", "log_loss", "name"],
        "rows": names,
        "recommended": {"name": "b", "reason": "because", "evidence": evidence},
        "peers": {"best_single": "b"},
    }


def test_a_plain_aligned_table_with_intervals_and_marks(ranking):
    lines = leaderboard.as_text(ranking).splitlines()
    assert "\x1b" not in "".join(lines)
    assert lines[0] == "test split, 30 samples, ordered by f1_macro"
    table = lines[1:5]
    place = table[0].index("accuracy")
    assert [line[place:].startswith("0.7500 [0.1000, 0.9000]  0.5000") for line in table[1:]] == [True] * 3
    assert table[1].endswith("0.040")
    assert table[2].endswith("optimistic, recommended")
    assert table[3].startswith("   -  x_%$|<&")
    assert table[3].endswith("contaminated")
    assert lines[-1].startswith(
        "recommended: b (because; 90 out-of-sample rows, oof+val: log-loss 0.4000 [0.3000, 0.5000], "
    )
    assert "Holm" in lines[-2]


def test_letters_are_styled_only_for_a_terminal(ranking, monkeypatch):
    lines = leaderboard.as_text(ranking, styled=True).splitlines()
    assert lines[3].startswith(leaderboard.BOLD)
    assert lines[4].startswith(leaderboard.FAINT)
    assert not leaderboard.is_terminal(io.StringIO())
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert leaderboard.is_terminal(terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not leaderboard.is_terminal(terminal)


def test_csv_holds_every_number_and_mark(ranking):
    lines = list(csv.DictReader(io.StringIO(leaderboard.as_csv(ranking))))
    assert [line["name"] for line in lines] == ["a_much_longer_name", "b", "x_%$|<&"]
    assert (lines[0]["log_loss"], lines[0]["log_loss_low"], lines[0]["log_loss_high"]) == ("1.25", "0.1", "0.9")
    assert (lines[0]["mcnemar_p_holm"], lines[1]["mcnemar_p_holm"]) == ("0.04", "")
    assert (lines[2]["rank"], lines[2]["contaminated"], lines[1]["recommended"]) == ("", "true", "true")


def test_names_are_escaped_for_markdown_and_latex(ranking):
    markdown = leaderboard.as_markdown(ranking).splitlines()
    assert {line.replace("\\|", "").count("|") for line in markdown} == {8}
    assert "x\\_%$\\|\\<&" in markdown[-1]
    latex = leaderboard.as_latex(ranking).splitlines()
    assert r"x\_\%\$\textbar{}\textless{}\& (contaminated)" in latex[-3]
    assert {line.replace(r"\&", "").count("&") for line in latex if line.endswith(r"\\")} == {6}


def test_one_without_intervals_is_shown_all_the_same(ranking):
    ranking["rows"][0]["ci95"] = None
    assert "0.7500  " in leaderboard.as_text(ranking)
    assert all(write(ranking) for write in leaderboard.WRITERS.values())


def test_a_table_in_a_terminal_fits_100_columns(ranking):
    names = ["a_name_that_is_as_long_as_that_of_a_calibrated_ensemble_of_ten_networks", "b", "c"]
    for entry, name in zip(ranking["rows"], names, strict=True):
        entry["name"] = name
    ranking["recommended"]["name"] = names[0]
    full = leaderboard.as_text(ranking).splitlines()[1:5]
    assert max(map(len, full)) > 150
    assert leaderboard.as_text(ranking, columns=250).splitlines()[1:5] == full
    for columns in (40, 100, 120):
        table = leaderboard.as_text(ranking, columns=columns).splitlines()[1:5]
        assert max(map(len, table)) <= max(columns, 100)
        assert table[1].split()[2:4] == ["0.7500", "[0.1000,"]
        assert table[1].split()[1].endswith("\N{HORIZONTAL ELLIPSIS}")
        assert "recommended" in table[1]


def test_the_columns_are_those_that_were_chosen(ranking):
    ranking["options"] = {"metrics": ["matthews_corrcoef", "top_5_accuracy"]}
    for line in ranking["rows"]:
        line |= {"matthews_corrcoef": 0.625, "top_5_accuracy": None}
        line["ci95"] = {"matthews_corrcoef": [0.25, 0.875]}
    table = leaderboard.as_text(ranking).splitlines()
    assert table[1].split("kind")[1].split("  ", 1)[0].strip() == ""
    assert "MCC [95%]" in table[1]
    assert "accuracy [95%]" not in table[1].replace("top-5 accuracy [95%]", "")
    assert "0.6250 [0.2500, 0.8750]  -" in table[2]
    first = next(csv.DictReader(io.StringIO(leaderboard.as_csv(ranking))))
    assert (first["matthews_corrcoef_low"], first["top_5_accuracy"], "accuracy" in first) == ("0.25", "", False)
    assert "| 0.6250 [0.2500, 0.8750] | -- |" in leaderboard.as_markdown(ranking)
    assert r"0.6250 {\scriptsize [0.2500, 0.8750]} & -- &" in leaderboard.as_latex(ranking)


def test_the_guide_shows_rows_that_are_printed(ranking):
    (shown,) = [block for block in page_outputs.blocks("guides/report.md") if "evaluate --metrics" in block[0]]
    ranking["options"] = {"metrics": shown[0].split("--metrics")[1].split()}
    scores = dict.fromkeys(ranking["options"]["metrics"], 0.75)
    ranking["rows"].append(ranking["rows"][2] | {"name": "d"})
    for line in ranking["rows"]:
        line |= scores | {
            "contaminated": False,
            "optimistic": False,
            "rank": 1,
            "ci95": dict.fromkeys(scores, (0.5, 1.0)),
        }
    ranking["rows"][0] |= {"kind": "member"}
    ranking["rows"][1] |= {"vs_best_single": HELD}
    ranking |= {"order": ["log_loss"], "recommended_fast": {"name": "d", "reason": "cheap", "evidence": None}}
    ranking["recommended_fast"]["evidence"] = ranking["recommended"]["evidence"]
    printed = leaderboard.as_text(ranking)
    names = ("a_much_longer_name", "b", "d", "x_%$|<&")
    assert page_outputs.not_printed(shown[1:], printed, names) == [], printed
