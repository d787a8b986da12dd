"""Search and digest of the mount; what needs a process of its own is in test_mount.py."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from foreign_base_back import build
from mounting import PROJECT, Mount, foreign, foreign_base_back, mount, mount_in

from utils import base_back
from utils.core.errors import UserError

__all__ = ["foreign", "foreign_base_back", "mount"]


def test_the_order_of_search(foreign: Mount) -> None:
    """Argument, BASE_BACK_DIR, the sibling of the project, the bundled one; what has no src/utils does not count."""
    root = foreign.cwd.parent / "somewhere"
    own = root / "project"
    shutil.copytree(PROJECT / "utils" / "core", own / "utils" / "core")
    for name in ("__init__.py", "base_back.py"):
        shutil.copy(PROJECT / "utils" / name, own / "utils" / name)
    for folder in ("given", "named", "BASE-BACK", "project/BASE-BACK"):
        for package in ("config", "utils"):
            (root / folder / "src" / package).mkdir(parents=True)
    foreign.more = {"PYTHONPATH": str(own), "BASE_BACK_DIR": str(root / "named"), "DBT_BASE_DIR": ""}
    code = f"""
import json, os, shutil
from utils.base_back import kind, locate
from utils.core.errors import UserError
root = {str(root)!r}
found = [str(locate(root + "/given"))]
found.append((str(locate()), kind(locate())))
del os.environ["BASE_BACK_DIR"]
found.append((str(locate()), kind(locate())))
shutil.rmtree(root + "/BASE-BACK/src/utils")
found.append((str(locate()), kind(locate())))
shutil.rmtree(root + "/project/BASE-BACK")
try:
    locate()
except UserError as error:
    found.append(str(error))
print(json.dumps(found))
"""
    found, _ = foreign.run("-c", code)
    assert found[0] == str(root / "given")
    assert found[1] == [str(root / "named"), "external"]
    assert found[2] == [str(root / "BASE-BACK"), "external"]
    assert found[3] == [str(own / "BASE-BACK"), "bundled"]
    assert f"{root / 'BASE-BACK'}: config in src" in found[4]
    assert f"{own / 'BASE-BACK'}: no such folder" in found[4]


def test_a_bundled_module_is_at_hand_whatever_is_mounted(mount: Mount) -> None:
    code = """
import json
from utils import base_back
from probe import look
module = base_back.load_bundled("samples")
print(json.dumps([module.__file__, module is base_back.load_bundled("samples"), look()["twice"], look()["torch"]]))
"""
    printed, _ = mount.run("-c", code)
    assert printed == [str(base_back.BUNDLED / "src" / "utils" / "samples.py"), True, {}, False]


def test_a_bad_setting_is_an_error_of_the_user(tmp_path: Path) -> None:
    code = """
import json
from utils import base_back; from utils.core import errors
try:
    base_back.settings()
except errors.UserError as error:
    print(json.dumps(str(error)))
"""
    printed, _ = mount_in(tmp_path, base_back.BUNDLED, DBT_MODEL_SIZE="huge").run("-c", code)
    assert "DBT_MODEL_SIZE" in printed
    assert printed.endswith("Correct the environment variable that it names")


def test_what_cannot_be_loaded_is_said_with_its_remedy(foreign: Mount) -> None:
    foreign.base_back = build(foreign.cwd.parent / "broken")
    src = foreign.base_back / "src"
    shutil.rmtree(src / "export")
    (foreign.cwd / "export.py").write_text("raise SystemExit('a stranger was imported')\n")
    (src / "models" / "__init__.py").write_text("import package_nobody_has\n")
    (foreign.cwd / "file").touch()
    code = """
import json, os, sys
from utils.base_back import load
from utils.core.errors import UserError
printed = []
for name in ("models", "export", "utils.nonsense", "config.settings"):
    if name == "config.settings":
        os.environ["DBT_BASE_DIR"] = os.path.abspath("file")
    try:
        load(name)
    except UserError as error:
        printed.append(str(error))
print(json.dumps(printed))
"""
    printed, _ = foreign.run("-c", code)
    assert len(printed) == 4
    assert all(str(foreign.base_back) in message for message in printed)
    assert "pip install package_nobody_has" in printed[0]
    assert "no package 'export'" in printed[1]
    assert "complete BASE-BACK" in printed[1]
    assert "No module named 'utils.nonsense'" in printed[2]
    assert f"The workspace is {foreign.cwd / 'file'}" in printed[3]


def test_modules_and_packages_hidden_by_ours_are_named_once_and_the_others_are_imported(foreign: Mount) -> None:
    foreign.base_back = build(foreign.cwd.parent / "same_names")
    theirs = foreign.base_back / "src" / "utils"
    for name in ("core.py", "training/__init__.py", "networks/blocks.py"):
        (theirs / name).parent.mkdir(exist_ok=True)
        (theirs / name).write_text("raise SystemExit('a hidden module was imported')\n")
    for name in ("losses/__init__.py", "losses/focal.py", "predictions/notes.txt"):
        (theirs / name).parent.mkdir(exist_ok=True)
        (theirs / name).write_text("GAMMA = 2\n")
    code = """
import json
from utils import base_back, core, networks, training
base_back.bind()
import utils.losses.focal, utils.core.errors, utils.training.progress, utils.networks.soups, utils.predictions.rows
ours = core, networks, training, utils.core.errors, utils.training.progress, utils.networks.soups
print(json.dumps([module.__file__ for module in (*ours, utils.losses.focal)]))
"""
    files, messages = foreign.run_script(code)
    assert all(Path(file).is_relative_to(PROJECT / "utils") for file in files[:-1])
    assert files[-1] == str(theirs / "losses" / "focal.py")
    assert messages.count("src/utils/core.py, src/utils/networks/, src/utils/training/ cannot be imported") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("nowhere", "found no such folder"),
        ("file", "found a file"),
        ("empty", "found nothing"),
        ("BASE-BACK/src", "did you mean {parent}/BASE-BACK?"),
        (".", "did you mean {parent}/BASE-BACK?"),
    ],
)
def test_a_folder_that_is_no_base_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    build(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for option, place in ((str(tmp_path / given), "--base-back"), (None, "BASE_BACK_DIR")):
        monkeypatch.setenv("BASE_BACK_DIR", str(tmp_path / given))
        with pytest.raises(UserError, match=re.escape(expected.format(parent=tmp_path))) as raised:
            base_back.locate(option)
        assert str(raised.value).startswith(place)
        assert "src/config and src/utils" in str(raised.value)


def test_the_bundled_one_has_no_module_of_a_name_of_ours() -> None:
    ours = {path.stem for path in (PROJECT / "utils").iterdir()}
    theirs = {path.stem for path in (base_back.BUNDLED / "src" / "utils").iterdir()}
    assert ours & theirs <= {"__init__", "__pycache__"}


def test_the_digest_covers_names_and_contents_of_the_sources(tmp_path: Path) -> None:
    folder = build(tmp_path)
    digests = [base_back.source_digest(folder)]
    (folder / "src" / "notes.txt").write_text("no source")
    (folder / "outside.py").write_text("no source")
    assert base_back.source_digest(folder) == digests[0]
    assert base_back.source_digest(build(tmp_path / "copy")) == digests[0]
    main = folder / "src" / "main.py"
    digests.append(base_back.source_digest(folder.rename(tmp_path / "renamed")))
    assert digests[1] == digests[0]
    main = tmp_path / "renamed" / "src" / "main.py"
    main.write_bytes(main.read_bytes() + b"\n")
    digests.append(base_back.source_digest(tmp_path / "renamed"))
    main.rename(main.with_name("first.py"))
    digests.append(base_back.source_digest(tmp_path / "renamed"))
    assert len(set(digests)) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
