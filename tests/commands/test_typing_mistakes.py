"""Mistakes of typing, each answered by what was meant, in the first line and before any list of what there is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from conftest import PROJECT, write_digits
from given_predictions import write
from in_process import run
from typing_mistakes import MISTAKES, first_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    write(folder / "given")
    write_digits(folder / "photos", classes=(1, 2), per_class=2)
    (folder / "work").mkdir()
    assert run("import-predictions", "--from", folder / "given", workspace=folder / "work").code == 0
    done = run(
        "build-ensemble", "--config", "configs/votes.yaml", "--set", "exports.enable=true", workspace=folder / "work"
    )
    assert done.code == 0, done.stderr
    return folder


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.typed[:60])
def test_the_first_line_says_what_was_meant(mistake, folder):
    done = run(*mistake.words(folder))
    assert done.code == mistake.code, done.stderr
    assert done.stdout == ""
    line = first_line(done.stderr)
    assert mistake.meant in line, done.stderr
    for mark in ("Choose from", "Allowed", "Available", "Known", "Looked for"):  # what was meant comes before the list
        assert mark not in line[: line.index(mistake.meant)]
    assert not re.search(r"\?\.|[^.]\.\.(?!\.)|;;|\s{2,}\S", line.split("|", 2)[-1].strip()), line


@pytest.mark.parametrize("name", ["recommended", "best"])
def test_a_name_may_be_that_of_the_recommendation(name, folder):
    assert "unknown" not in run("evaluate", "--model-name", name, workspace=folder / "work").stderr
    assert run("evaluate", "--model-name", name, workspace=folder / "work").code == 0


def test_a_method_is_a_name_of_its_ensemble(folder):
    done = run("evaluate", "--model-name", "soft_voting", "--json", workspace=folder / "work")
    assert done.document["name"] == "soft_voting_ensemble"


# wrong folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("evaluate",), ("discover",), ("status",), ("build-ensemble",), ("pipeline",)])
def test_an_empty_folder_stays_empty(command, tmp_path):
    done = run(*command, workspace=tmp_path)
    assert done.code == (0 if command == ("status",) else 1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_networks_is_named_with_the_workspace_that_was_meant(folder, tmp_path):
    done = run("evaluate", workspace=tmp_path)
    assert f". {tmp_path} holds no networks; `make demo` trains some" in done.stderr
    (tmp_path / "workspaces" / "leaves-1" / "checkpoints").mkdir(parents=True)
    done = run("evaluate", workspace=tmp_path)
    assert f"did you mean --workspace {tmp_path}/workspaces/leaves-1?" in done.stderr
    assert "holds no networks" not in run("evaluate", workspace=tmp_path / "workspaces" / "leaves-1").stderr


def test_predict_without_a_model_says_which_may_be_named(folder):
    done = run("predict", folder / "photos", workspace=folder / "work")
    assert done.code == 2
    assert "--model-name --from-export is required, such as --model-name recommended" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate",),
        ("discover",),
        ("status",),
        ("clean", "--temporary"),
        ("config", "--set", "seed=1"),
        ("import-predictions", "--from", "given"),
    ],
)
def test_nothing_is_written_beside_photographs(command, folder, tmp_path):
    photos = Path(shutil.copytree(folder / "photos", tmp_path / "my leaves"))
    done = run(*command, workspace=photos)
    assert done.code == 1
    assert f"make demo DATA='{photos}'" in done.stderr
    assert sorted(path.name for path in photos.iterdir()) == ["1", "2"]


def test_a_folder_whose_classes_lie_one_level_down_is_named(base_main, folder, tmp_path):
    data = tmp_path / "my leaves"
    shutil.copytree(folder / "photos", data / "Data")
    shutil.copytree(folder / "photos" / "1", data / "previews")
    for _ in range(2):
        done = base_main("--data", str(data), "--stages", "split", workspace=tmp_path / "work")
        assert done.returncode == 1
        assert f"did you mean {data / 'Data'} (2 class folders)?" in done.stderr
        assert "remove" not in done.stderr
        assert not (tmp_path / "work").exists()
        shutil.rmtree(data / "previews", ignore_errors=True)


def test_a_mistyped_path_ends_predict_before_any_row(folder, tmp_path):
    right, wrong = folder / "photos" / "1", folder / "photos" / "11" / "a.png"
    answers = tmp_path / "answers.csv"
    for to in ((), ("--to", answers)):
        done = run("predict", right, wrong, "--model-name", "recommended", *to, workspace=folder / "work")
        assert done.code == 1
        assert done.stdout == ""
        assert str(wrong) in done.stderr
    assert not answers.exists()


def test_messages_of_the_program_have_no_seams():
    """Templates whose pieces would meet in `?.`, `..` or two spaces."""
    seams = []
    for path in sorted([*(PROJECT / "utils").rglob("*.py"), PROJECT / "ensemble_orchestrator.py"]):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.search(r"\{(errors\.)?(did_you_mean|nearest_first)\([^\"']*\)\}[.;,:]", line):
                seams.append(f"{path.relative_to(PROJECT)}:{number}: {line.strip()}")
            if re.search(r"f?\"[^\"]*\b(the the|a a|it it|is is)\b", line) or re.search(r"\?\. [A-Z]", line):
                seams.append(f"{path.relative_to(PROJECT)}:{number}: {line.strip()}")
    assert seams == []
