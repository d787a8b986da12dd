"""The report's section on external sets, and what the terminal says of them."""

from __future__ import annotations

import pytest
from external_records import external_record, write_external_set
from report_pages import CONFIG, page_of, write_page

import report as synthetic_report
from utils.core.errors import UserError
from utils.evaluation import external_text
from utils.evaluation.report import report_page

CLASSES = ("<b>hostile</b>", "line\nbreak", "c", "d")
MODELS = ("ensemble_00", "ensemble_01")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, without_figures):
    made = synthetic_report.synthetic(tmp_path_factory.mktemp("synthetic"), classes=CLASSES)
    write_page(made)
    return made


def test_a_page_gets_a_section_for_a_set_and_is_outdated_until_then(workspace):
    assert "External sets" not in page_of(workspace).text
    assert report_page.is_current(CONFIG, workspace, "test")
    write_external_set(workspace, MODELS, CLASSES, image="<img src=x>.jpg")
    assert not report_page.is_current(CONFIG, workspace, "test")
    write_page(workspace)
    page = page_of(workspace)
    for words in (
        *("External sets", "field", "71.0%", "[65.0, 77.0]", "-22.0", "[-27.0, -17.0]", "0.830", "[0.780, 0.870]"),
        *("<b>hostile</b> drops", "line\\nbreak", "90.0% of 20", "40.0% of 50", "<img src=x>.jpg: is train/a/1.jpg"),
        "accuracy drops: 93.0% on 60 test images, 71.0% here",
    ):
        assert words in page.text, words
    assert [facts for facts in page.of("section") if facts["id"] == "external"]
    assert all(facts["src"].startswith("data:") for facts in page.of("img"))


def test_a_damaged_record_is_named(workspace, tmp_path):
    path = workspace.external_set("broken")
    path.parent.mkdir(parents=True)
    path.write_text('{"set": 3}')
    with pytest.raises(UserError, match=r"external\.json"):
        write_page(workspace)
    path.unlink()


def test_the_terminal_states_the_drop_the_promises_and_what_is_left_out():
    text = external_text.as_text(external_record(MODELS, CLASSES), MODELS)
    for words in (
        *(
            "field: 200 images of 4 classes",
            "1 image of train or val: a/1.jpg = train/a/1.jpg",
            "Other name as <b>hostile",
        ),
        *("3 images of other classes: weed", "absent one; they remain possible answers", "1 image of the set"),
        *("ensemble_00, which is recommended by out-of-sample rows alone:", "-0.2200 [-0.2700, -0.1700]"),
        *("recall drops in <b>hostile</b> 90% -> 40%", "(ECE) 0.030 on test, 0.140 here; at the temperature"),
        *("hold the class of 90%: 91.0% on test, 62.0% here", "20.0% of the 60% that are answered here"),
        "AUROC 0.830 [0.780, 0.870]",
    ):
        assert words in text, words


def test_a_model_that_is_scored_alone_is_the_one_of_the_sentences():
    text = external_text.as_text(external_record(MODELS, CLASSES), ["ensemble_01"])
    assert "\nensemble_01:\n" in text
