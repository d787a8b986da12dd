"""`status` finds what is built, stale and next without torch, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import in_process
import pytest
from conftest import PROJECT, run_python
from finished_workspace import CONFIG, DEMO, at, files, look, run, status, workspace

import ensemble_orchestrator
from utils.core import locks
from utils.core.config_file import load_config
from utils.core.workspace import Workspace
from utils.discovery import discover

__all__ = ["workspace"]


def test_a_finished_workspace_is_current_and_has_no_next_command(workspace):
    found = status(workspace)
    assert found.next is None
    assert found.text.endswith("nothing is missing or stale")
    assert found.document["catalog"]["state"] == found.document["evaluation"]["state"] == "current"
    assert {state["state"] for state in found.document["ensembles"].values()} == {"current"}
    assert {state["state"] for splits in found.document["predictions"].values() for state in splits.values()} == {
        "current"
    }
    sizes = found.document["bytes"]
    assert sizes["temporary"] == 0
    assert all(sizes[name] > 0 for name in ("decoded_images", "predictions", "embeddings", "ensembles"))
    assert found.document["quota_gb"] == 20


def test_predictions_that_a_forced_build_removed_are_stored_again(own_copy):
    workspace = at(own_copy)
    files_of = {path: path.read_bytes() for path in sorted(workspace.models.glob("*/predictions_test.npz"))}
    assert files_of
    for path in files_of:
        path.unlink()
    assert status(workspace).document["evaluation"]["state"] == "stale"
    assert run(own_copy, "evaluate").code == 0
    assert status(workspace).document["evaluation"]["state"] == "current"
    assert {path: path.read_bytes() for path in files_of} == files_of


def test_status_loads_no_torch_and_writes_nothing(own_copy):
    before = files(own_copy)
    code = (
        "import sys, ensemble_orchestrator as o\n"
        "assert o.main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'sklearn', 'PIL', 'timm'} & set(sys.modules)"
    )
    done = run_python("-c", code, "status", *DEMO, "--quiet", "--workspace", str(own_copy))
    assert done.returncode == 0, done.stderr
    left = {name: content for name, content in files(own_copy).items() if not name.endswith(".log")}
    assert left == {name: content for name, content in before.items() if not name.endswith(".log")}


def test_the_next_command_leads_from_images_to_a_ranking(synthetic, tmp_path):
    """Doing what it says, again and again, ends."""
    base = Path(shutil.copytree(synthetic, tmp_path / "w"))
    commands = []
    while (found := run(base, "status", "--json").document).get("next"):
        words = found["next"].split()
        assert words[:2] == ["python", "ensemble_orchestrator.py"]
        commands.append(words[2])
        with in_process.every_plot():
            done = in_process.run(*words[2:])
        assert done.code == 0, done.stderr
        assert len(commands) < 5, commands
    assert commands == ["discover", "build-ensemble", "evaluate"]


def test_an_empty_workspace_is_told_how_to_train(tmp_path):
    done = run(tmp_path, "status")
    assert done.code == 0
    assert f"next: train networks: make demo, or python {PROJECT}/BASE-BACK/src/main.py --workspace {tmp_path}" in (
        done.stdout
    )


def touched(path: Path, seconds: float = 10) -> None:
    then = time.time() + seconds
    os.utime(path, (then, then))


def of_other_code(workspace: Workspace) -> None:
    record = json.loads(workspace.catalog.read_text())
    record["base_back"]["digest"] = "another"
    workspace.catalog.write_text(json.dumps(record))


def images(workspace: Workspace) -> list[Path]:
    return sorted((workspace.split_dir / "val").glob("*/*.png"))


def edited(paths: list[Path]) -> None:
    """Another last byte, in place: name, size and folder are as before."""
    for path in paths:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda w: touched(w.checkpoint("CustomConvNeXt", "final")),
            "checkpoints/CustomConvNeXt_final.pth has changed",
        ),
        (lambda w: w.checkpoint("CustomConvNeXt", "fold1").unlink(), "checkpoints/CustomConvNeXt_fold1.pth is gone"),
        (lambda w: touched(w.base_oof("CustomViTHybrid")), "CustomViTHybrid_oof_predictions.npz has changed"),
        (lambda w: copied(w, "New", "final"), "New_final.pth is new"),
        (lambda w: copied(w, "CustomConvNeXt", "snapshot9"), "CustomConvNeXt_snapshot9.pth is new"),
        (lambda w: touched(w.split_dir / "val" / "1"), "images of val were added or removed"),
        (lambda w: edited(images(w)[:1]), "val/0/{first} has changed"),
        (lambda w: edited(images(w)), "28 images of val have changed, first 0/{first}"),
        (lambda w: [path.unlink() or touched(path.parent, -10) for path in images(w)[:7]], "val/0: the class folder"),
        (lambda w: of_other_code(w), "the code of BASE-BACK has changed"),
    ],
    ids=["changed", "gone", "oof", "new member", "new role", "images", "edited", "all edited", "empty class", "code"],
)
def test_a_catalog_older_than_its_files_is_stale_with_the_reason(workspace, change, reason):
    discover.discover(load_config(CONFIG), workspace)  # the digests of the copy's own files are known from here on
    reason = reason.format(first=images(workspace)[0].name)
    change(workspace)
    state = look(workspace).catalog
    assert state.state == "stale"
    assert len(state.reasons) == 1
    assert reason in state.reasons[0]
    found = status(workspace)
    assert found.next == "discover"
    assert reason in found.text


def copied(workspace: Workspace, backbone: str, role: str) -> None:
    """With the time of change of the original, as `cp -p` does it."""
    shutil.copy2(workspace.checkpoint("CustomConvNeXt", "final"), workspace.checkpoint(backbone, role))


def test_in_a_moved_workspace_times_decide(workspace):
    assert look(workspace).catalog.state == "current"
    touched(workspace.checkpoint("CustomConvNeXt", "final"))
    touched(images(workspace)[0])
    assert look(workspace).catalog.reasons == (
        "checkpoints/CustomConvNeXt_final.pth has changed",
        f"val/0/{images(workspace)[0].name} has changed",
    )


def test_a_split_that_is_gone_is_made_before_anything_else(workspace):
    shutil.rmtree(workspace.split_dir / "test")
    found = status(workspace)
    assert f"{workspace.split_dir / 'test'} is gone" in found.text
    assert found.text.endswith(f"main.py --workspace {workspace.base} --stages split")
    assert found.next is None


def test_a_missing_and_a_damaged_catalog(workspace):
    workspace.catalog.write_text("{")
    assert look(workspace).catalog.state == "damaged"
    assert status(workspace).next == "discover"
    workspace.catalog.unlink()
    assert look(workspace).catalog.state == "missing"
    assert status(workspace).next == "discover"


def test_ensembles_and_predictions_of_an_old_checkpoint_are_named(workspace):
    shutil.copy(workspace.checkpoint("CustomConvNeXt", "snapshot1"), workspace.checkpoint("CustomConvNeXt", "final"))
    discover.discover(load_config(CONFIG), workspace)
    found = look(workspace)
    assert found.catalog.state == "current"
    assert set(found.stale_ensembles()) == {"hard_voting_ensemble", "logit_averaging_ensemble", "soft_voting_ensemble"}
    assert found.ensembles["soft_voting_ensemble"].reasons == ("CustomConvNeXt has another checkpoint now",)
    assert str(found.predictions["CustomConvNeXt"]["val"]) == "stale: of an old checkpoint"
    assert found.predictions["CustomViTHybrid"]["val"].state == "current"
    assert found.evaluation.state == "stale"
    assert status(workspace).next == "build-ensemble"
    assert "CustomConvNeXt on test  stale: of an old checkpoint" in status(workspace).text


def test_predictions_of_other_images_and_damaged_ones_are_named(workspace):
    edited(images(workspace)[:1])
    (workspace.predictions("CustomConvNeXt", "test") / "record.json").write_text("{")
    discover.discover(load_config(CONFIG), workspace)
    found = look(workspace).predictions["CustomConvNeXt"]
    assert str(found["val"]) == "stale: of other images"
    assert found["test"].state == "damaged"


def test_an_ensemble_of_a_member_that_is_gone_is_stale(workspace):
    for path in workspace.checkpoints.glob("CustomViTHybrid*"):
        path.unlink()
    discover.discover(load_config(CONFIG), workspace)
    reasons = look(workspace).ensembles["soft_voting_ensemble"].reasons
    assert reasons == ("CustomViTHybrid is no longer in the catalog",)


def test_other_settings_and_other_members_make_an_ensemble_stale(workspace):
    (reason,) = look(workspace, "seed=7").ensembles["soft_voting_ensemble"].reasons
    assert "seed" in reason
    found = look(workspace, "backbones.exclude=[CustomViTHybrid]")
    (reason,) = found.ensembles["soft_voting_ensemble"].reasons
    assert reason == (
        "built from CustomConvNeXt, CustomResNetMish, CustomViTHybrid; the configuration selects CustomConvNeXt, "
        "CustomResNetMish"
    )
    assert status(workspace, "backbones.exclude=[CustomViTHybrid]").next == "build-ensemble"


def test_a_damaged_ensemble_and_a_missing_one(workspace):
    (workspace.ensemble("soft_voting_ensemble") / "combiner.safetensors").write_bytes(b"x")
    (workspace.ensemble("hard_voting_ensemble") / "ensemble.json").unlink()
    found = look(workspace)
    assert found.ensembles["soft_voting_ensemble"].state == "damaged"
    assert found.ensembles["hard_voting_ensemble"].state == "missing"
    assert status(workspace).next == "build-ensemble"


def test_an_ensemble_that_the_configuration_does_not_list_is_no_reason_to_build(workspace):
    shutil.copy(workspace.checkpoint("CustomConvNeXt", "snapshot1"), workspace.checkpoint("CustomConvNeXt", "final"))
    discover.discover(load_config(CONFIG), workspace)
    assert status(workspace, "runs.score_ensemble.enable=false").next == "evaluate"


def test_a_configuration_that_selects_nothing_is_said(workspace):
    found = status(workspace, "backbones.include=[CustomRegNet]")
    assert "problem: " in found.text
    assert found.document["problems"][0].count("none of CustomRegNet is in the catalog") == 1
    assert found.next is None


def test_a_reader_is_not_blocked_and_sees_who_writes(own_copy):
    hold = (
        "import sys, pathlib\n"
        "from utils.core import locks\n"
        "with locks.writer_lock(pathlib.Path(sys.argv[1]), 'stack'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", hold, str(at(own_copy).lock)]
    process = subprocess.Popen(command, cwd=PROJECT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() == "held\n"
    done = run(own_copy, "status", "--json")
    assert done.code == 0, done.stderr
    writer = json.loads(done.stdout)["writer"]
    assert (writer["command"], writer["pid"], writer["dead"]) == ("stack", process.pid, False)
    assert run(own_copy, "clean").code == 0  # lists only
    refused = run(own_copy, "clean", "--confirm")
    assert refused.code == 1
    assert f"`stack`, process {process.pid}" in refused.stderr
    process.communicate()
    assert not at(own_copy).lock.exists()


def test_a_dead_writer_is_shown_as_such(workspace):
    owner = locks.this_process("stack")
    workspace.lock.write_text(json.dumps(vars(owner) | {"started": 1}))
    assert "no longer running" in status(workspace).text
    workspace.lock.write_text("{")
    assert "damaged" in status(workspace).text


def test_the_table_says_which_commands_write():
    writes = {name: command.writes for name, command in ensemble_orchestrator.COMMANDS.items()}
    assert writes["status"] is False
    assert writes["clean"] == ("confirm", "temporary")
    assert all(writes[name] is True for name in ("discover", "build-ensemble", "evaluate", "pipeline"))
