"""`evaluate --maps`: class-activation maps of the report's example images, and when the page shows them."""

from __future__ import annotations

import given_predictions as given
import pytest
from conftest import PROJECT
from report_pages import page_of
from stored_predictions import workspace_at

from utils.activation_maps import map_maker
from utils.building import build_commands
from utils.core.artifacts import read_json, write_json
from utils.core.config_file import load_config
from utils.core.errors import ConfigError
from utils.evaluation.evaluate import evaluate
from utils.evaluation.report import report_audit
from utils.external_sets import command
from utils.networks import class_maps
from utils.networks.class_maps import NoMapError

CONFIG = load_config(PROJECT / "configs" / "votes.yaml", overrides=["device=cpu"])
HINT = "evaluate --maps adds class-activation maps"

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture
def workspace(own_copy):
    return workspace_at(own_copy)


def maps_in(page) -> list[dict]:
    return [facts for facts in page.of("img") if facts["alt"].startswith("Class-activation map of image")]


def changed_record(workspace, **changes) -> None:
    """`maps.json` with other values of every picture, or of the record."""
    path = workspace.report_maps("test")
    record = read_json(path, remedy="")
    inner = {key: changes.pop(key) for key in list(changes) if key in ("uri", "outside_centre")}
    record["pictures"] = {key: entry | inner for key, entry in record["pictures"].items()}
    write_json(path, record | changes)


def test_every_example_image_gets_a_map_and_the_page_stays_the_same(workspace, monkeypatch):
    assert evaluate(CONFIG, workspace).failures == []
    page = page_of(workspace)
    n_images = len(page.of("img"))
    assert HINT in page.text
    assert n_images > 0

    assert evaluate(CONFIG, workspace, maps=True).failures == []
    page, path = page_of(workspace), workspace.report("test")
    assert len(maps_in(page)) == n_images
    assert all(facts["src"].startswith("data:image/") for facts in maps_in(page))
    assert HINT not in page.text
    assert "of their mass lies outside the central half of the image" in page.text

    monkeypatch.setattr(map_maker.streaming, "open_network", lambda *_: pytest.fail("a network was opened"))
    first, before = path.read_bytes(), path.stat().st_mtime_ns
    for maps in (False, True):
        evaluate(CONFIG, workspace, maps=maps)
        assert path.stat().st_mtime_ns == before
    path.unlink()
    evaluate(CONFIG, workspace)
    assert path.read_bytes() == first
    assert evaluate(CONFIG, workspace, maps=True, force=True).failures == []
    assert path.read_bytes().count(b"Class-activation map of image") == n_images


def test_the_background_is_named_where_maps_and_audit_agree(workspace, monkeypatch):
    evaluate(CONFIG, workspace, maps=True)
    monkeypatch.setattr(report_audit, "section", lambda *_: None)
    for outside, stands_out in ((0.71, True), (0.72, False), (0.4, True)):
        changed_record(workspace, outside_centre=outside)
        probes = [{"name": "border pixels", "accuracy": 0.81, "stands_out": stands_out}]
        monkeypatch.setattr(report_audit, "current_record", lambda *_, found=probes: {"probes": found})
        evaluate(CONFIG, workspace)
        text = page_of(workspace).text
        assert f"On average {100 * outside:.0f}% of their mass" in text
        sentence = "looks at the background: in the audit, border pixels alone predict the class of 81% of the images."
        is_said = sentence in text
        assert is_said == (outside > 0.5 and stands_out)


def test_maps_of_another_model_are_not_shown(workspace):
    evaluate(CONFIG, workspace, maps=True)
    changed_record(workspace, key="of another model")
    evaluate(CONFIG, workspace)
    page = page_of(workspace)
    assert not maps_in(page)
    assert HINT in page.text
    evaluate(CONFIG, workspace, maps=True)
    assert maps_in(page_of(workspace))


def test_members_without_a_map_are_named(workspace, monkeypatch):
    def refusing(self, images):
        raise NoMapError(self.name, "no positions")

    monkeypatch.setattr(class_maps.ClassMaps, "probe", refusing)
    assert evaluate(CONFIG, workspace, maps=True).failures == []
    page = page_of(workspace)
    assert not maps_in(page)
    assert "has no map: no positions." in page.text
    assert "outside the central half" not in page.text


def test_a_picture_that_is_none_is_a_failure_that_names_the_file(workspace):
    evaluate(CONFIG, workspace, maps=True)
    changed_record(workspace, uri="https://example.org/a.png")
    (failure,) = evaluate(CONFIG, workspace).failures
    assert "maps.json: 'https://example.org/a.png' is no picture" in failure


def test_changed_checkpoints_are_a_failure(workspace):
    for path in workspace.checkpoints.glob("*.pth"):
        path.write_bytes(b"other")
    failures = evaluate(CONFIG, workspace, maps=True).failures
    assert any(failure.startswith("maps: ") and "changed since discovery" in failure for failure in failures)
    assert page_of(workspace).of("img")


def test_imported_predictions_have_no_maps(tmp_path):
    workspace = given.empty_workspace(tmp_path / "workspace")
    given.take_in(workspace, given.write(tmp_path / "given"))
    build_commands.build_ensemble(CONFIG, workspace)
    assert evaluate(CONFIG, workspace).failures == []
    assert HINT not in page_of(workspace).text
    assert evaluate(CONFIG, workspace, maps=True).failures == []
    assert "has no map: no member that counts has a network" in page_of(workspace).text


def test_options_that_make_no_report_of_a_split_are_refused(workspace):
    with pytest.raises(ConfigError, match="expected without --model-name"):
        evaluate(CONFIG, workspace, maps=True, model_name="recommended")
    with pytest.raises(ConfigError, match="expected without --data"):
        command.evaluate(CONFIG, workspace, data="images", maps=True)
