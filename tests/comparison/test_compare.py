"""The command `compare`: the worked example of Demsar (2006) from records on disk, few workspaces, and bad input."""

from __future__ import annotations

import csv
import io
import json

import page_outputs
import pytest
from demsar import AREAS, DATA_SETS, METHODS
from evaluated_workspaces import write_workspace
from in_process import run

from utils.comparison import critical_difference
from utils.comparison.compare import DIAGRAMS


@pytest.fixture
def fourteen(tmp_path):
    """The fourteen data sets as workspaces, each with classes of its own."""
    return [
        write_workspace(tmp_path / name, dict(zip(METHODS, areas, strict=True)), classes=(name, "other"))
        for name, areas in zip(DATA_SETS, AREAS.tolist(), strict=True)
    ]


def compare(*line):
    return run("compare", *line)


def test_the_example_of_demsar_is_reproduced_from_records(fourteen, tmp_path):
    done = compare(*fourteen, "--models", *METHODS, "--control", "C4.5", "--to", str(tmp_path / "out"), "--json")
    assert done.code == 0, done.stderr
    record = json.loads(done.stdout)
    found = {method["name"]: method for method in record["methods"]}
    assert {name: round(method["mean_rank"], 3) for name, method in found.items()} == {
        **{"C4.5": 3.143, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}
    }
    assert round(record["friedman"]["chi_square"], 2) == 9.28
    assert (round(record["friedman"]["f"], 2), record["friedman"]["degrees"]) == (3.69, [3, 39])
    assert round(record["nemenyi"]["critical_difference"], 2) == 1.25
    assert {name for name, method in found.items() if name != "C4.5" and method["rank_p_holm"] < 0.05} == {
        *("C4.5+m", "C4.5+m+cf")
    }
    assert found["C4.5+m"]["wilcoxon_p"] < 0.05
    assert found["C4.5+m"]["gain"] == pytest.approx((AREAS[:, 1] - AREAS[:, 0]).mean())
    low, high = found["C4.5+m"]["gain_ci95"]
    assert 0 < low < found["C4.5+m"]["gain"] < high
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {
        *("comparison.json", "comparison.csv", "comparison.md", "comparison.tex", "pairs.csv", *DIAGRAMS)
    }
    assert (folder / DIAGRAMS[0]).read_bytes().startswith(b"\x89PNG")
    assert (folder / DIAGRAMS[1]).read_bytes().startswith(b"%PDF")
    lines = list(csv.DictReader(io.StringIO((folder / "comparison.csv").read_text())))
    assert [line["name"] for line in lines] == ["C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"]
    assert float(lines[0]["wine"]) == 0.970
    assert "| wine | 0.9700 (2) | 0.9780 (1) | 0.9460 (4) | 0.9570 (3) |" in (folder / "comparison.md").read_text()
    assert "mean rank & 1.964 & 2.000 & 2.893 & 3.143" in (folder / "comparison.tex").read_text()
    assert len((folder / "pairs.csv").read_text().splitlines()) == 1 + 6
    stored = json.loads((folder / "comparison.json").read_text())
    assert stored["methods"] == record["methods"]


def test_the_guide_shows_the_output_for_workspaces_of_its_scores(tmp_path):
    """The table of the page is printed again, figure by figure, from scores with its means and gains."""
    (shown,) = [block for block in page_outputs.blocks("guides/report.md") if "compare ~/citrus" in block[0]]
    citrus = {"best_single": 53 / 59, "voting": 54 / 59, "stacking_lr": 54 / 59, "recommended": 55 / 59}
    digits = {"best_single": 354 / 360, "voting": 342 / 360, "stacking_lr": 348 / 360, "recommended": 354 / 360}
    folders = []
    for name, scores in (("citrus", citrus), ("digits", digits)):
        votes = ("hard_voting_ensemble", "logit_averaging_ensemble", "soft_voting_ensemble")
        methods = {"lite0_stages": scores["best_single"], "fusion_concat_mlp": scores["recommended"]}
        methods |= {"stacking_lr": scores["stacking_lr"]} | dict.fromkeys(votes, scores["voting"])
        folders.append(
            write_workspace(tmp_path / name, methods, "lite0_stages", "fusion_concat_mlp", classes=(name, "other"))
        )
    options = ("--models", "best_single", "recommended", "fusion_concat_mlp", "stacking_lr", *votes)
    printed = [line.strip() for line in compare(*folders, *options).stdout.splitlines()]
    assert [line for line in map(str.strip, shown[1:]) if line not in printed] == [], printed


def test_the_text_says_what_the_tests_say(fourteen):
    done = compare(*fourteen)
    assert done.code == 0, done.stderr
    assert "Friedman's test: F" in done.stdout
    assert "the mean ranks differ" in done.stdout
    assert "Nemenyi's test: methods differ whose mean ranks are" in done.stdout
    assert "Wilcoxon's signed-rank test against best_single, Holm-corrected" in done.stdout
    gain = (AREAS[:, 3] - AREAS[:, 0]).mean()
    assert f"the recommended model gains {gain:+.4f} [" in done.stdout
    assert "mean of 14 workspaces" in done.stdout


def test_few_workspaces_are_described_and_not_tested(fourteen, tmp_path):
    folder = tmp_path / "out"
    assert compare(*fourteen, "--to", str(folder)).code == 0
    done = compare(*fourteen[:5], "--to", str(folder), "--json")
    record = json.loads(done.stdout)
    assert (record["friedman"], record["nemenyi"], record["pairs"]) == (None, None, None)
    assert {method["gain_ci95"] for method in record["methods"]} == {None}
    assert "5 workspaces are too few for a test" in record["notes"]["tests"]
    assert "on breast cancer" in record["summary"]
    assert not (folder / DIAGRAMS[0]).exists()  # that of the fourteen
    assert "too few" in compare(*fourteen[:2]).stdout
    one = compare(fourteen[0])
    assert one.code == 1
    assert "one workspace; expected two or more" in one.stderr


def test_losses_rank_the_lowest_first(fourteen):
    record = json.loads(compare(*fourteen, "--metric", "log_loss", "--models", *METHODS, "--json").stdout)
    assert record["methods"][0]["name"] == "C4.5+m+cf"
    assert {method["name"]: method["gain"] for method in record["methods"]}["C4.5+m"] == pytest.approx(
        (AREAS[:, 1] - AREAS[:, 0]).mean()
    )


def test_seeds_of_one_data_set_are_told_from_data_sets(tmp_path):
    folders = [write_workspace(tmp_path / str(seed), {"C4.5": 0.8, "C4.5+m": 0.82 + seed / 100}) for seed in range(6)]
    record = json.loads(compare(*folders, "--json").stdout)
    assert "1 different lists of classes" in record["notes"]["data_sets"]


def test_methods_that_are_not_everywhere_or_not_ranked_are_left_out(tmp_path):
    all_three = {"C4.5": 0.8, "C4.5+m": 0.9, "C4.5+m+cf": 0.85}
    folders = [
        write_workspace(tmp_path / "a", all_three),
        write_workspace(tmp_path / "b", all_three, unranked=("C4.5+m",)),
    ]
    record = json.loads(compare(*folders, "--json").stdout)
    assert record["left_out"] == {"C4.5+m": ["b"]}
    assert {method["name"] for method in record["methods"]} == {"C4.5", "C4.5+m+cf", "best_single", "recommended"}
    named = compare(*folders, "--models", "C4.5+m", "C4.5+mcf")
    assert named.code == 1
    assert "C4.5+m has no score in b" in named.stderr
    assert "C4.5+mcf is nowhere; did you mean 'C4.5+m+cf'?" in named.stderr


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["{a}", "{a}"], 1, "given twice"),
        (["{a}", "{none}"], 1, "no such file; expected a workspace whose test split is evaluated"),
        (["{a}", "{b}", "--metric", "acuracy"], 2, "did you mean 'accuracy'?"),
        (["{a}", "{b}", "--metric", "mce"], 1, "has no mce, as evaluated by an earlier version"),
        (["{a}", "{b}", "--metric", "top_5_accuracy"], 1, "has no score in a, b"),
        (["{a}", "{b}", "--control", "best_singel"], 1, "did you mean 'best_single'?"),
        (["{a}", "{b}", "--to", "{a}/metrics_output/ensembles/ranking.json"], 1, "expected a folder"),
    ],
)
def test_bad_input_is_named(tmp_path, line, code, words):
    for name in "ab":
        write_workspace(tmp_path / name, {"C4.5": 0.8, "C4.5+m": 0.9})
    done = compare(*(word.format(a=tmp_path / "a", b=tmp_path / "b", none=tmp_path / "none") for word in line))
    assert done.code == code
    assert words in done.stderr


def test_a_damaged_record_is_named(tmp_path):
    folders = [write_workspace(tmp_path / name, {"C4.5": 0.8, "C4.5+m": 0.9}) for name in "ab"]
    path = tmp_path / "b" / "metrics_output" / "ensembles" / "C4.5+m" / "metrics.json"
    path.write_text("{")
    done = compare(*folders)
    assert (done.code, str(path) in done.stderr, "evaluate --force" in done.stderr) == (1, True, True)
    path.unlink()
    assert "no such file, though ranked" in compare(*folders).stderr


def test_lines_join_methods_that_do_not_differ():
    assert critical_difference.cliques([1.964, 2.0, 2.893, 3.143], 1.25) == [(0, 3)]
    assert critical_difference.cliques([1.964, 2.0, 2.893, 3.143], 1.15) == [(0, 2), (1, 3)]
    assert critical_difference.cliques([1.0, 2.0, 3.0], 0.5) == []
