"""The page that `evaluate` writes: what is in it, for every kind of workspace, and when it is written again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace

import given_predictions as given
import pytest
from conftest import PROJECT
from in_process import empty_figures, few_plots
from report_pages import CONFIG, Page, page_of, write_page

import ensemble_orchestrator
import report as synthetic_report
from utils.building import build_commands
from utils.core.artifacts import read_json, write_json
from utils.core.config import Config
from utils.core.config_file import load_config
from utils.core.config_sections import Project
from utils.core.workspace import Workspace
from utils.evaluation.evaluate import evaluate
from utils.evaluation.report import report_page, thumbnails

pytestmark = pytest.mark.usefixtures("few_folds")

DEMO = ("--config", "configs/votes.yaml")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    workspace = synthetic_report.synthetic(tmp_path_factory.mktemp("synthetic"))
    write_page(workspace)
    return workspace


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A workspace of imported predictions, without images, with empty figures."""
    folder = tmp_path_factory.mktemp("evaluated")
    workspace = given.empty_workspace(folder / "workspace")
    given.take_in(workspace, given.write(folder / "given"))
    build_commands.build_ensemble(CONFIG, workspace)
    with empty_figures():
        evaluate(CONFIG, workspace)
    return workspace


@pytest.fixture
def imported(tmp_path, evaluated):
    """A copy of it to change; figures are empty meanwhile."""
    with empty_figures():
        yield given.empty_workspace(shutil.copytree(evaluated.base, tmp_path / "workspace"))


def test_every_part_is_there_when_all_is_measured(synthetic):
    page = page_of(synthetic)
    for words in (
        *("Use ensemble_00 (lowest log-loss on honest rows)", "Compared with the best single model (Custom00): +1.0"),
        *("the difference is not significant", "p = 0.20 by McNemar's exact test", "3 rows left out"),
        "ordered by log-loss",
        *("A confidence threshold of", "LAC", "APS", "91.0%", "[86.0, 94.0]", "OOD score than 95%"),
        *("before the temperature", "Confident errors", "Most disputed", "Likely mislabelled", "CPU, 2 threads"),
        *("held out", "25.0%", "does not beat log_linear_pool", "Error correlation"),
        "px of shorter side",
        *("Matthews", "Balanced accuracy", "Mean and deviation over folds", "Specificity", "NPV"),
        "AUC of ensemble_00 less that of Custom00: +0.0020 [-0.0010, 0.0050]; DeLong's test: p = 0.19",
    ):
        assert words in page.text, words
    assert len(page.of("img")) == 20
    assert "not measured" not in page.text
    labels = [facts["aria-label"] for facts in page.of("svg")]
    assert len(labels) == 12
    assert {"ROC curves of ensemble_00 on 300 rows of test, each class against the rest"} < set(labels)
    assert any("of each pair of 4 members" in label for label in labels)


def test_it_is_one_file_that_asks_for_nothing(synthetic):
    text = synthetic.report("test").read_text(encoding="utf-8")
    page = page_of(synthetic)
    assert not page.of("script")
    assert all(facts["href"].startswith(("#", "data:,")) for facts in page.of("link") + page.of("a"))
    assert all(facts["src"].startswith("data:image/") for facts in page.of("img"))
    assert set(re.findall(r"https?:[^\s\"]+", text)) == set()
    assert len(text) < 5e6
    ids = [facts["id"] for _, facts in page.elements if "id" in facts]
    assert len(ids) == len(set(ids))


def test_empty_figures_of_one_test_are_not_found_again_by_another(tmp_path):
    size = replace(synthetic_report.QUICK, rows=200)  # figures that no other test draws
    workspace = synthetic_report.synthetic(tmp_path, size)
    with empty_figures():
        write_page(workspace)
    assert "before the temperature" not in page_of(workspace).text
    workspace.report("test").unlink()
    write_page(workspace)
    assert "before the temperature" in page_of(workspace).text


def test_it_is_the_same_again_and_current_until_a_record_changes(tmp_path):
    workspace = synthetic_report.synthetic(tmp_path)
    assert not report_page.is_current(CONFIG, workspace, "test")
    first = write_page(workspace).read_bytes()
    assert report_page.is_current(CONFIG, workspace, "test")
    assert write_page(workspace).read_bytes() == first
    record = read_json(workspace.ensemble_metrics("ensemble_00", "test"), remedy="")
    write_json(workspace.ensemble_metrics("ensemble_00", "test"), record | {"accuracy": 0.123})
    assert not report_page.is_current(CONFIG, workspace, "test")
    write_page(workspace)
    assert "12.3%" in page_of(workspace).text


def test_a_page_of_stored_records_is_the_one_that_was_written_with_them(evaluated):
    path = evaluated.report("test")
    first, before = path.read_bytes(), path.stat().st_mtime_ns
    with empty_figures():
        assert evaluate(CONFIG, evaluated).document["report"] == str(path)
        assert path.stat().st_mtime_ns == before
        path.unlink()
        assert evaluate(CONFIG, evaluated).document["report"] == str(path)
    assert path.read_bytes() == first


def test_without_images_rows_are_named_and_nothing_is_drawn_of_them(imported):
    page = page_of(imported)
    assert not page.of("img")
    assert "This workspace has no images" in page.text
    assert re.search(r"test/(ant|bee|cat)/3\d\d\d\.png", page.text)
    assert "val/" in page.text or "train/" in page.text
    assert "not measured" in page.text
    assert "test has only 30 rows" in page.text


def test_hostile_names_are_text(tmp_path):
    classes = ("<script>alert(1)</script>", '" onload="alert(1)', "$x_1$ {{ 7 * 7 }}\n")
    renamed = dict(zip(given.CLASSES, classes, strict=True))

    def change(member, stem, arrays):
        ids = [f"{row}<img src=x onerror=alert(1)>\udce9" for row in range(len(arrays["sample_ids"]))]
        arrays["sample_ids"] = given.np.array([f"{stem}{name}".encode("utf-8", "replace").decode() for name in ids])
        return arrays | {"classes": given.np.array([renamed[name] for name in arrays["classes"].tolist()])}

    workspace = given.empty_workspace(tmp_path / "workspace")
    given.take_in(workspace, given.write(tmp_path / "given", change=change))
    build_commands.build_ensemble(CONFIG, workspace)
    with few_plots():  # with all figures of the page
        evaluate(CONFIG, workspace)
    page = page_of(workspace)
    assert not page.of("script")
    assert not page.of("img")
    assert not any(key.startswith("on") for _, facts in page.elements for key in facts)
    assert "<script>alert(1)</script>" in page.text
    assert "$x_1$ {{ 7 * 7 }}\\n" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text


def test_another_split_has_a_page_of_its_own(imported):
    before = imported.report("test").read_bytes()
    evaluate(CONFIG, imported, split="val")
    assert "scores are optimistic" in page_of(imported, "val").text
    assert imported.report("test").read_bytes() == before


def test_one_model_alone_gets_no_page(imported):
    imported.report("test").unlink()
    found = evaluate(CONFIG, imported, model_name="soft_voting_ensemble")
    assert not imported.report("test").exists()
    assert "report" not in found.document


def test_what_cannot_be_shown_is_said_and_the_rest_stays(tmp_path):
    workspace = synthetic_report.synthetic(tmp_path)
    (workspace.ensemble("ensemble_00") / "predictions_test.npz").unlink()
    write_page(workspace)
    page = page_of(workspace)
    assert "Single rows of test are not shown" in page.text
    assert "Error correlation" in page.text
    shutil.rmtree(workspace.all_oof)
    write_page(workspace)
    page = page_of(workspace)
    assert "The contribution of each member is not shown" in page.text
    assert "Ranking" in page.text


def test_a_damaged_record_is_a_failure_and_the_ranking_is_shown(imported):
    imported.report("test").unlink()
    path = imported.member_metrics("bayes", "test")
    path.write_text("{")
    result = evaluate(CONFIG, imported)
    assert [failure.startswith(f"report: {path}: damaged") for failure in result.failures] == [True]
    assert result.document["rows"]
    assert evaluate(CONFIG, imported, force=True).failures == []


def test_an_image_that_is_gone_is_said(tmp_path):
    workspace = synthetic_report.synthetic(tmp_path)
    for path in (workspace.split_dir / "test").rglob("*.jpg"):
        path.unlink()
    write_page(workspace)
    page = page_of(workspace)
    assert "the file is missing" in page.text
    assert len(page.of("img")) < 20


def test_thumbnails_are_made_for_the_chosen_images_alone(tmp_path, monkeypatch):
    workspace = synthetic_report.synthetic(tmp_path)
    made, thumbnail = [], thumbnails.thumbnail
    monkeypatch.setattr(
        "utils.evaluation.report.report_images.thumbnail", lambda path: made.append(path) or thumbnail(path)
    )
    write_page(workspace)
    assert len(made) == 20


def test_the_commands_to_do_it_again_are_understood(tmp_path):
    workspace = synthetic_report.synthetic(tmp_path)
    config = load_config(
        PROJECT / "configs" / "votes.yaml", overrides=["runs.score_ensemble.methods=[soft_voting]", "seed=7"]
    )
    write_page(workspace, config)
    lines = [line.strip() for line in page_of(workspace).words if line.startswith("python ensemble_orchestrator.py")]
    commands = [shlex.split(line) for line in "\n".join(lines).splitlines()]
    assert [words[2] for words in commands] == [
        "discover",
        "build-ensemble",
        "evaluate",
        "predict",
        "evaluate",
        "export",
    ]
    for words in commands:
        parsed = ensemble_orchestrator.build_parser().parse_args(words[2:])
        again = load_config(PROJECT / parsed.config, overrides=parsed.set)
        assert again.digest() == config.digest()
        assert parsed.workspace == str(tmp_path)


def test_the_commands_end_with_the_page(built, orchestrator, own_copy):
    path = own_copy / "ensembles" / "report" / "index.html"
    assert path.is_file()
    done = orchestrator("pipeline", *DEMO, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(path)
    done = orchestrator("evaluate", *DEMO, "--json", workspace=own_copy)
    assert json.loads(done.stdout)["report"] == str(path)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.of("img")
    assert all(facts["src"].startswith("data:image/png") for facts in page.of("img"))


@pytest.mark.parametrize(
    ("name", "folder", "images", "title"),
    [
        (None, "work", "leaves", "leaves"),
        (None, "work", "leaves/Data", "leaves"),
        (None, "my_leaves-15c7ae7b", None, "my_leaves"),
        (None, "leaves/workspace", None, "leaves"),
        ("Citrus 2026", "work", "leaves", "Citrus 2026"),
    ],
)
def test_the_title_is_the_project_or_the_folder_of_the_images(tmp_path, name, folder, images, title):
    workspace = Workspace(tmp_path / folder, *(tmp_path / folder / part for part in "abcdefg"))
    if images:
        write_json(workspace.split_dir / "split_manifest.json", {"raw_dir": str(tmp_path / images)})
    config = Config() if name is None else Config(project=Project(name=name))
    assert report_page.subject(config, workspace) == title
