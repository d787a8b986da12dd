"""`discover --verify` under an assumed preprocessing: the rule that fits better is named, and nothing is changed."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from given_predictions import empty_workspace
from PIL import Image
from timm_folders import ARCHITECTURE, fit_head, save_folder

from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.discovery import discover, preprocessing_checks, preprocessing_sources
from utils.networks.preprocessing import Preprocessing
from utils.predictions import catalog

CLASSES = ("blue", "red", "yellow")
COLOURS = ((60, 60, 160), (160, 60, 60), (150, 150, 60))
FILES = 12


@pytest.fixture
def config():
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=["device=cpu"])


@pytest.fixture(scope="module")
def photographed(tmp_path_factory) -> Workspace:
    """Images of three colours with noise."""
    workspace = empty_workspace(tmp_path_factory.mktemp("photographed"))
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name, colour in zip(CLASSES, COLOURS, strict=True):
            for number in range(FILES):
                pixels = rng.normal(colour, 30, (40, 48, 3)).clip(0, 255).astype(np.uint8)
                path = workspace.split_dir / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return workspace


@pytest.fixture
def workspace(photographed, tmp_path) -> Workspace:
    shutil.copytree(photographed.base, tmp_path / "w")
    return empty_workspace(tmp_path / "w")


def write_network(workspace, path, preprocessing: Preprocessing):
    """A network whose head is fitted on the train images under a preprocessing; the file records nothing of it."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES)).eval()
    files = sorted((workspace.split_dir / "train").glob("*/*.png"))
    fit_head(model, files, [CLASSES.index(file.parent.name) for file in files], preprocessing)
    torch.save(model.state_dict(), path)
    return path


def timms() -> Preprocessing:
    return preprocessing_sources.of_architecture(ARCHITECTURE, 32)


@pytest.fixture(scope="module")
def file(photographed, tmp_path_factory):
    """A network under the preprocessing that is assumed."""
    return write_network(photographed, tmp_path_factory.mktemp("networks") / "leaf.pth", timms())


def problems(workspace, code):
    return [problem for problem in catalog.read(workspace).problems if problem.code == code]


def test_a_rule_that_fits_better_is_named_with_the_option_that_sets_it(workspace, config):
    file = write_network(workspace, workspace.base / "leaf.pth", replace(timms(), channels="BGR"))
    add = [f"leaf=timm:{ARCHITECTURE}@{file}"]
    result = discover.discover(config, workspace, add=add)
    assert "its preprocessing is not stated" in result.text
    result = discover.discover(config, workspace, verify=True)
    assert catalog.read(workspace).members["leaf"].preprocessing == timms().as_record()
    (problem,) = problems(workspace, preprocessing_checks.FITS_BETTER)
    assert "BGR" in problem.message
    command = "python ensemble_orchestrator.py discover --preprocess leaf:channels=BGR"
    assert problem.remedy == f"nothing is changed; to use it: {command}"
    discover.discover(config, workspace)  # runs no network, and says the same
    assert problems(workspace, preprocessing_checks.FITS_BETTER) == [problem]
    options = shlex.split(problem.remedy.partition("--preprocess ")[2])
    discover.discover(config, workspace, verify=True, preprocess=options)
    member = catalog.read(workspace).members["leaf"]
    assert (member.preprocessing["channels"], member.preprocessing["source"]) == ("BGR", "user")
    assert {problem.code for problem in catalog.read(workspace).problems} & {
        preprocessing_checks.FITS_BETTER,
        "preprocessing_assumed",
    } == set()


def test_without_a_better_rule_the_assumption_becomes_an_info(workspace, file, config, monkeypatch):
    discover.discover(config, workspace, verify=True, add=[f"leaf=timm:{ARCHITECTURE}@{file}"])
    (assumed,) = problems(workspace, "preprocessing_assumed")
    assert assumed.severity == "info"
    assert "other common rules fits 36 val images better" in assumed.message
    assert problems(workspace, preprocessing_checks.FITS_BETTER) == []
    leaf = catalog.read(workspace).members["leaf"]
    assert preprocessing_checks.is_assumed(workspace, leaf)
    assert not preprocessing_checks.is_assumed(workspace, replace(leaf, source="derived"))
    (classes,) = problems(workspace, "classes_assumed")
    assert (classes.severity, "on 36 val images confirms it" in classes.message) == ("info", True)
    monkeypatch.setattr(preprocessing_checks, "_logits", lambda *_: pytest.fail("it ran again"))
    discover.discover(config, workspace, verify=True)
    assert problems(workspace, "preprocessing_assumed") == [assumed]


def test_a_rule_under_which_the_network_fails_is_left_out(workspace, file, config, monkeypatch):
    logits, known = preprocessing_checks._logits, []

    def failing(inspector, member, rule, *others):
        if rule.channels == "BGR":
            raise UserError("logits that are not finite")
        known.extend([] if known else [logits(inspector, member, rule, *others)])
        return known[0]  # the network need not run under every rule

    monkeypatch.setattr(preprocessing_checks, "_logits", failing)
    discover.discover(config, workspace, verify=True, add=[f"leaf=timm:{ARCHITECTURE}@{file}"])
    (assumed,) = problems(workspace, "preprocessing_assumed")
    count = len(preprocessing_checks.candidate_rules(timms(), ARCHITECTURE))
    assert f"none of {count - 1} other common rules" in assumed.message


def test_a_stated_preprocessing_is_not_compared(workspace, file, config, monkeypatch):
    monkeypatch.setattr(preprocessing_checks, "_logits", lambda *_: pytest.fail("it ran"))
    add = [f"leaf=timm:{ARCHITECTURE}@{file}"]
    result = discover.discover(config, workspace, verify=True, add=add, preprocess=["input_size=64"], verbose=True)
    assert "preprocessing_assumed" not in {problem.code for problem in catalog.read(workspace).problems}
    assert "leaf: preprocessing 64 px of shorter side 67, bilinear, mean 0.5, std 0.5 (user)" in result.text


def test_candidates_differ_from_the_current_rule_and_from_each_other():
    for current in (timms(), Preprocessing.of_base_pipeline(160).with_source("assumed")):
        rules = preprocessing_checks.candidate_rules(current, ARCHITECTURE)
        inputs = [str(rule.inputs_record()) for rule in [current, *rules]]
        assert len(set(inputs)) == len(inputs)
        assert {rule.input_size for rule in rules} == {160}
        assert any(rule.channels == "BGR" for rule in rules)
        assert any(rule.resize == "squash" for rule in rules)


def test_a_declaration_that_fails_leaves_the_catalog_as_it_was(workspace, file, config):
    discover.discover(config, workspace, add=[f"leaf=timm:{ARCHITECTURE}@{file}"])
    before = workspace.catalog.read_bytes()
    with pytest.raises(UserError, match="no such file"):
        discover.discover(config, workspace, add=[f"tree=timm:{ARCHITECTURE}@{file}x"])
    assert workspace.catalog.read_bytes() == before


def test_folders_that_fail_are_failures_of_the_result_and_the_others_are_added(workspace, config, tmp_path):
    save_folder(tmp_path / "networks" / "leaf", CLASSES, label_names=list(CLASSES))
    (tmp_path / "networks" / "bare").mkdir()
    (tmp_path / "networks" / "bare" / "model.safetensors").touch()
    result = discover.discover(config, workspace, add_from=[str(tmp_path / "networks")])
    assert list(catalog.read(workspace).members) == ["leaf"]
    (failure,) = result.failures
    assert "bare: no config.json" in failure
    assert "declared from folders: leaf" in result.text


def test_the_error_of_a_comparison_counts_groups():
    gains = np.random.default_rng(0).normal(0.15, 1, 40)[np.arange(400) // 10]
    alone = preprocessing_checks._standard_errors(gains)
    assert alone > 2.5 * preprocessing_checks._standard_errors(gains, np.arange(400) // 10) > 0
    assert preprocessing_checks._standard_errors(gains, np.arange(400) // 80) == 0.0  # five groups
