"""`make bench`: which programs it runs, what it makes of their last lines; the pipeline benchmark's figures."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys

import pytest
from conftest import PROJECT, run_python

FOLDER = PROJECT / "benchmarks"


def module(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where dataclasses look for the names in their annotations
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def bench():
    return module("all")


@pytest.fixture(scope="module")
def pipeline():
    return module("pipeline")


def test_every_program_of_the_folder_has_the_one_form(bench):
    helpers = {
        "all",
        "claim_checks",
        "claim_checks_uncertainty",
        "distillation_rows",
        "distillation_runs",
        "export_proofs",
        "gpu_runs",
        "gpu_workspace",
        "large_inputs",
        "planted_copies",
        "prepare",
        "reporting",
        "simulated_workspaces",
        "stacking_costs",
    }
    assert set(bench.programs()) == {path.stem for path in FOLDER.glob("*.py")} - helpers
    for name in bench.programs():
        assert '"--quick"' in (FOLDER / f"{name}.py").read_text(encoding="utf-8"), name


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_import_of_a_benchmark_names_what_there_is(path):
    """Also of those inside its functions, which only a run of many minutes would meet."""
    imports = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    modules = [node for node in imports if node.module.partition(".")[0] in ("utils", "tests", "demo")]
    modules += [node for node in imports if (FOLDER / f"{node.module}.py").is_file()]
    missing = []
    for node in modules:
        found = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(found, alias.name) and not importlib.util.find_spec(f"{node.module}.{alias.name}"):
                missing.append(f"{node.module}.{alias.name}")
    assert missing == []


REPORT = {
    "benchmark": "speed",
    "quick": True,
    "rows": [
        {"what": "a", "figure": 1.05, "unit": "x", "goal": "at most 1.1", "holds": True, "peer": None},
        {"what": "b", "figure": 2.0, "unit": "x", "goal": "at most 1.1", "holds": False, "peer": None},
        {"what": "c", "figure": None, "unit": "x", "goal": "at least 2", "holds": None, "peer": None},
        {"what": "d", "figure": 3.0, "unit": "s", "goal": None, "holds": None, "peer": None},
    ],
}


def test_the_table_shows_goal_figure_and_verdict(bench):
    lines = bench.table([REPORT | {"seconds": 7, "commit": "abc"}], ["broken"])
    captured = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert captured[0] == ["row", "figure", "goal", ""]
    assert set(lines[1]) == {"|", "-"}
    assert captured[2:6] == [
        ["**speed** (quick)", "", "", "7 s, commit abc"],
        ["a", "1.050 x", "at most 1.1", "pass"],
        ["b", "2.000 x", "at most 1.1", "SHORT"],
        ["c", "", "at least 2", "not measured"],
    ]
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[6:] == ["", "1 pass, 1 short, 1 not measured, 1 failed: broken"]


@pytest.fixture
def programs(bench, tmp_path, monkeypatch):
    """A folder with one benchmark that reports, one that fails and one that ends without JSON."""
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "programs", lambda: ["bad", "good", "mute"])
    (tmp_path / "good.py").write_text(f"import sys\nprint('noise', sys.argv[1:])\nprint({json.dumps(REPORT)!r})")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "mute.py").write_text("print('no JSON')")
    return tmp_path


def test_last_lines_are_read_and_failures_named(bench, programs, capsys):
    assert bench.main(["--quick"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert (found["failed"], [report["benchmark"] for report in found["reports"]]) == (["bad", "mute"], ["speed"])
    assert "noise ['--quick']" in captured.err
    assert bench.main(["good"]) == 0


def test_a_report_is_kept_and_shown_again_where_that_is_asked_for(bench, programs, capsys, monkeypatch):
    monkeypatch.setattr(bench, "commit", lambda: "abc+")
    assert bench.main(["good"]) == 0
    assert [path.name for path in (programs / "zoo" / "reports").iterdir()] == ["good.json"]
    monkeypatch.setattr(bench, "commit", lambda: "def")
    assert bench.main(["good", "--quick"]) == 0  # another form, another file
    (programs / "good.py").write_text("raise SystemExit(3)")
    capsys.readouterr()
    assert bench.main(["good", "--continue"]) == 0
    captured = capsys.readouterr().out
    assert "0 s, commit abc+" in captured
    assert json.loads(captured.splitlines()[-1])["reports"][0]["rows"] == REPORT["rows"]
    assert bench.main(["good"]) == 1


def test_the_commit_tells_of_files_that_differ(bench, tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert bench.commit() == "unknown"
    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    clean = bench.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "file").write_text("two")
    assert bench.commit() == f"{clean}+"


def test_what_needs_a_gpu_runs_by_its_name_alone(bench, programs, monkeypatch):
    monkeypatch.setattr(bench, "programs", lambda: ["good", "gpu"])
    ran = programs / "gpu ran"
    (programs / "gpu.py").write_text(f"open({str(ran)!r}, 'w')\nprint({json.dumps(REPORT)!r})")
    assert bench.main([]) == 0
    assert not ran.exists()
    assert bench.main(["gpu"]) == 0
    assert ran.exists()


def test_an_unknown_name_is_usage(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["nothing"])
    assert ended.value.code == 2
    assert "no benchmark called nothing; there are" in capsys.readouterr().err


POINTS = [
    {"members": members, "images": images, "first": members * images**0.5, "second": 0.5, "torch": False, "stages": 7}
    | {"left_out": []}
    for members, images in ((3, 1000), (6, 1000), (12, 1000), (6, 500), (6, 1797))
]


def test_growth_is_the_slope_among_points_that_are_equal_otherwise(pipeline):
    assert pipeline.growth(POINTS, "members") == pytest.approx(1)
    assert pipeline.growth(POINTS, "images") == pytest.approx(0.5)
    assert pipeline.growth(POINTS[:1], "images") is None


def test_a_second_run_is_held_to_a_second_and_three_percent(pipeline):
    def verdicts(**change):
        rows = pipeline.rows([{**POINTS[0], "first": 10.0, **change}])
        return [row["holds"] for row in rows if "second run" in row["what"]]

    assert verdicts(second=1.3) == [True]
    assert verdicts(second=1.31) == [False]
    assert verdicts(second=0.4, torch=True) == [False]


def test_another_commit_is_held_to_half_its_time_and_its_log_loss(pipeline):
    def verdicts(seconds, loss):
        here = [{"seconds": value, "cpu_seconds": 2 * value, "log_loss": loss} for value in seconds]
        there = [{"seconds": 10.0, "cpu_seconds": 10.0, "log_loss": 0.3}]
        rows = pipeline.comparison_rows("2 members", here, there, "abc")
        assert rows[2]["figure"] == pytest.approx(2 * rows[0]["figure"])
        return [(row["figure"], row["holds"]) for row in rows if row["goal"]]

    assert verdicts((4.0, 6.0), 0.3) == [(0.5, True), (0.3, True)]
    assert verdicts((5.1, 5.3), 0.31) == [(0.52, False), (0.31, False)]


def test_the_log_loss_beside_another_commit_is_that_of_the_recommended_ensemble(pipeline, tmp_path):
    rows = [{"name": "first", "log_loss": 0.1}, {"name": "second", "log_loss": 0.2}]
    (tmp_path / "metrics_output").mkdir()
    ranking = tmp_path / "metrics_output" / "ranking.json"
    ranking.write_text(json.dumps({"recommended": {"name": "second"}, "rows": rows}), encoding="utf-8")
    name, losses = pipeline.recommended(tmp_path)
    assert losses[name] == 0.2


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="not a git checkout")
def test_the_files_of_a_commit_are_taken_from_git(pipeline, tmp_path):
    folder = pipeline.project_of("HEAD", tmp_path / "project")
    assert (folder / "ensemble_orchestrator.py").is_file()
    assert not (folder / ".git").exists()


@pytest.fixture(scope="module")
def verbs():
    return module("verbs")


def test_a_verb_runs_in_a_clone_of_its_own_and_must_end_well(verbs, monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", " -- QUICK=1 ARGS=nothing")
    monkeypatch.setenv("DBT_SEED", "3")
    assert not {"MAKEFLAGS", "DBT_SEED"} & verbs.environment().keys()
    helped = verbs.measured(verbs.Verb(("help",), 60))
    assert (helped["what"], helped["goal"], helped["holds"]) == ("make help", "at most 60", True)
    assert 0 < helped["figure"] < 60
    failed = verbs.measured(verbs.Verb(("nothing",), 60))
    assert failed["holds"] is False
    assert failed["peer"].startswith("ended with 2: ")


def test_a_verb_that_takes_too_long_is_short_whatever_it_ends_with(verbs):
    demo = verbs.VERBS[0]
    assert [verbs.judged(demo, seconds, code, "")["holds"] for seconds, code in ((240, 4), (241, 0), (9, 1))] == [
        *(True, False, False)
    ]


def test_a_mistake_that_is_not_answered_by_what_was_meant_is_named(verbs, monkeypatch):
    right = next(mistake for mistake in verbs.MISTAKES if mistake.typed == "evalute")
    monkeypatch.setattr(verbs, "MISTAKES", (right, right._replace(typed="statsu")))
    monkeypatch.setattr(verbs, "MISTAKE_TURNS", 1)
    monkeypatch.setattr(verbs, "make_workspace", lambda folder: None)
    answered, slowest = verbs.mistakes_rows()
    assert (answered["figure"], answered["holds"], answered["peer"]) == (1, False, "statsu")
    assert slowest["figure"] > 0


@pytest.mark.slow
def test_the_quick_form_of_the_pipeline_ends_with_its_report():
    done = run_python(str(FOLDER / "pipeline.py"), "--quick", afresh=True)  # it keeps what it trains in benchmarks/zoo
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(point["members"], point["images"]) for point in found["points"]] == [(2, 120), (3, 120)]
    assert all(row["holds"] for row in found["rows"] if "second run" in row["what"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["export", "export_full", "fusion", "member_memory", "mixture", "report", "scale", "soup_memory"]
)
def test_a_quick_form_ends_with_its_report(name):
    done = run_python(str(FOLDER / f"{name}.py"), "--quick", afresh=True)  # some keep zoos in benchmarks/zoo
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["benchmark"], found["quick"]) == (name, True)
    silent = [row for row in found["rows"] if row["goal"] and row["figure"] is None]
    assert [row["what"] for row in silent if row["peer"] != "tools not installed"] == []
