"""A workspace of a stranger, with symbolic links in it: nothing is written behind them; the workspace may be a link."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from given_predictions import write
from in_process import run

from utils.core.errors import UserError
from utils.core.links import require_unlinked

pytestmark = pytest.mark.usefixtures("few_folds")

VOTES = (
    *("--set", "runs.score_ensemble.methods=[soft_voting]", "--set", "pruning.enable=false"),
    *("--set", "runs.model_soup.enable=false", "--set", "dataset.num_workers=0", "--set", "device=cpu"),
)
IMPORT, BUILD, EVALUATE = (
    ("import-predictions", "--force", "--from", "{given}"),
    ("build-ensemble", *VOTES),
    ("evaluate",),
)
VERIFY = ("discover", "--verify", *VOTES)
LINKED = {
    "ensembles": ((IMPORT, 1), (BUILD, 1), (EVALUATE, 1)),
    "ensembles/predictions": ((IMPORT, 1),),
    "ensembles/predictions/forest": ((IMPORT, 1),),
    "ensembles/oof_predictions": ((IMPORT, 1),),
    "ensembles/models": ((BUILD, 1),),
    "ensembles/models/soft_voting_ensemble": ((BUILD, 1),),
    "ensembles/report": ((("evaluate", "--force"), 4),),
    "metrics_output": ((("evaluate", "--force"), 1),),
    "metrics_output/ensembles": ((("evaluate", "--force"), 1),),
    "debug_logs": ((("evaluate", "--force"), 0),),
}
"""{folder that is a link: ((command, exit code), ...)}; a log that cannot be written ends no command."""


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("linked")
    write(folder / "given")
    (folder / "workspace").mkdir()
    assert run("import-predictions", "--from", folder / "given", workspace=folder / "workspace").code == 0
    for line in (BUILD, EVALUATE):
        assert run(*line, workspace=folder / "workspace").code == 0
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("linked", LINKED)
def test_nothing_is_written_behind_a_link(template, tmp_path, linked):
    workspace, elsewhere = tmp_path / "workspace", tmp_path / "elsewhere"
    shutil.copytree(template / "workspace", workspace)
    (workspace / linked).mkdir(parents=True, exist_ok=True)
    (workspace / linked).rename(elsewhere)
    (workspace / linked).symlink_to(elsewhere)
    before = content(elsewhere)
    for line, code in LINKED[linked]:
        words = [word.replace("{given}", str(template / "given")) for word in line]
        done = run(*words, *(("--force",) if line == BUILD else ()), workspace=workspace)
        assert done.code == code, done.stdout + done.stderr
        assert f"{workspace / linked}: a symbolic link to" in done.stderr or code == 0
    assert content(elsewhere) == before
    assert run("status", "--json", workspace=workspace).document["catalog"]["members"] == ["bayes", "forest", "linear"]


def test_decoded_images_are_not_written_behind_a_link(synthetic, tmp_path):
    workspace, elsewhere = tmp_path / "workspace", tmp_path / "elsewhere"
    shutil.copytree(synthetic, workspace)
    shutil.rmtree(workspace / "image_cache", ignore_errors=True)
    elsewhere.mkdir()
    (workspace / "image_cache").symlink_to(elsewhere)
    done = run(*VERIFY, workspace=workspace)
    assert done.code in (1, 4)
    assert f"{workspace / 'image_cache'}: a symbolic link" in done.stdout + done.stderr
    assert list(elsewhere.iterdir()) == []


def test_a_workspace_that_is_a_link_is_the_folder_that_was_named(template, tmp_path):
    shutil.copytree(template / "workspace", tmp_path / "real")
    (tmp_path / "workspace").symlink_to(tmp_path / "real")
    assert run(*BUILD, "--force", workspace=tmp_path / "workspace").code == 0
    (tmp_path / "output").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "output")
    assert run("evaluate", "--output", tmp_path / "linked", workspace=tmp_path / "real").code in (0, 1)


def test_folders_above_the_workspace_and_a_linked_file_do_not_count(tmp_path, monkeypatch):
    (tmp_path / "above" / "workspace" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "above")
    monkeypatch.setenv("DBT_BASE_DIR", str(tmp_path / "link" / "workspace"))
    monkeypatch.delenv("DBT_ENSEMBLE_DIR", raising=False)
    workspace = tmp_path / "link" / "workspace"
    (workspace / "a" / "file").symlink_to(tmp_path)
    require_unlinked(workspace / "a" / "file")
    require_unlinked(tmp_path / "other" / "file")
    (workspace / "b").symlink_to(workspace / "a")
    with pytest.raises(UserError, match=r"b: a symbolic link to .*--output DIR"):
        require_unlinked(workspace / "b" / "c" / "file")
