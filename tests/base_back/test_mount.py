"""The mount: this project's `utils` and a BASE-BACK's packages in one process, whatever else lies on the path."""

from __future__ import annotations

import logging
import os
import re
from functools import partial
from pathlib import Path

import pytest
from foreign_base_back import build
from mounting import PROJECT, Mount, assert_whole, foreign, foreign_base_back, mount, mount_in, snapshot

from utils.base_back import BUNDLED

__all__ = ["foreign", "foreign_base_back", "mount"]
# Ours that consist of torch modules; whoever imports one of these does so where it is needed.
TORCH_MODULES = {
    *("fusion_heads", "heads", "routing_heads", "soup_trials", "soups", "stacking_heads", "trees"),
    *("distillation_methods", "target_sources", "student_training", "ensemble_network", "image_preparation"),
    *("batch_schedule", "optimization", "progress", "joint_networks", "joint_training", "training_memory"),
    *(
        "image_source",
        "class_maps",
        "views",
        "batched_training",
        "batched_perceptrons",
        "batched_heads",
        "batched_gates",
    ),
}
"""Imported inside functions alone, once something is trained, averaged or exported."""
SPAWN = (
    "import multiprocessing, os; multiprocessing.process.ORIGINAL_DIR = os.getcwd(); "
    "context = multiprocessing.context.SpawnContext()"
)
"""Workers that start Python, from the working directory, also where the program itself is a fork (`warm`)."""
STRANGERS = ("config.py", "models/__init__.py", "training.py", "export.py", "utils/__init__.py")

# The specification's block; only its `...` ends are left out.
BLOCK = """
# Configuration
from config.settings import (
    BACKBONES, NUM_CLASSES, IMG_SIZE, BATCH_SIZE,
    CKPT_DIR, METRICS_DIR, KFOLD_DIR, DEPLOY_DIR
)

# Utils
from utils import (
    logger, smoke_checker, DEVICE, set_seed,
    compute_file_sha256
)

# Data
from utils.datasets import (
    WindowsCompatibleImageFolder, create_optimized_transforms,
    create_optimized_dataloader, prepare_optimized_datasets
)

# Models
from models import create_custom_backbone_safe, BACKBONE_MAP

# Training
from training import (
    train_epoch_optimized, validate_epoch_optimized,
    get_loss_function_for_backbone, create_optimized_optimizer,
    create_improved_scheduler
)
"""


@pytest.fixture
def strangers(foreign: Mount) -> Mount:
    """A working directory full of modules that are called like BASE-BACK's, and end the process when imported."""
    for name in STRANGERS:
        (foreign.cwd / name).parent.mkdir(exist_ok=True)
        (foreign.cwd / name).write_text("raise SystemExit(f'a stranger was imported: {__file__}')\n")
    return foreign


def test_the_printed_import_block_works_from_any_folder(mount: Mount) -> None:
    code = (
        "import utils, utils.core.messages\nutils.core.messages.set_up_logging(level='DEBUG')\n"
        + BLOCK
        + """
import json, logging, pickle, sys
import export, models, training.pipeline, utils.core.errors, utils._base
from probe import look

name = "CustomConvNeXt"
model = create_custom_backbone_safe(name, 3)
again = pickle.loads(pickle.dumps(model))
logger.debug("seen")
only = [n for n in vars(utils._base) if not n.startswith("_") and n not in utils.base_back.EXPORTS + ("annotations",)]
print(json.dumps({
    "look": look(),
    "level": logging.getLogger("disease_pipeline").level,
    "class": [type(model) is BACKBONE_MAP[name], type(again) is BACKBONE_MAP[name], type(again).__module__],
    "loader": pickle.loads(pickle.dumps(WindowsCompatibleImageFolder)) is utils.datasets.WindowsCompatibleImageFolder,
    "eleven": [getattr(utils, n) is getattr(utils._base, n) for n in utils.base_back.EXPORTS],
    "cached": [n for n in utils.base_back.EXPORTS if n not in vars(utils)],
    "others": [n for n in only if not isinstance(getattr(utils._base, n), type(sys)) and hasattr(utils, n)],
    "base_dir": str(CKPT_DIR.parent),
    "below": utils.__path__,
}))
"""
    )
    printed, errors = mount.run_script(code)
    assert_whole(printed["look"], mount)
    assert printed["look"]["path"][-1] == str(mount.base_back / "src")
    assert {"config.settings", "utils._base", "utils.datasets", "models", "training", "export"} <= set(
        printed["look"]["files"]
    )
    assert printed["below"] == [str(PROJECT / "utils"), str(mount.base_back / "src" / "utils")]
    assert printed["class"][:2] == [True, True]
    assert printed["class"][2].startswith("models.")
    assert printed["loader"]
    assert printed["eleven"] == [True] * 11
    assert printed["cached"] == printed["others"] == []
    assert printed["base_dir"] == str(mount.workspace)
    assert printed["level"] == logging.DEBUG
    assert re.search(r"^\d\d:\d\d:\d\d \| DEBUG \| seen$", errors, re.MULTILINE)
    assert list(mount.cwd.iterdir()) == []


@pytest.mark.parametrize("how", ["script", "command"])
def test_modules_of_the_same_names_in_the_working_directory_do_not_win(strangers: Mount, how: str) -> None:
    """Also in a spawned worker that meets a model of BASE-BACK's before anything has imported `utils`."""
    code = (
        f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\n"
        + ("import utils\n" + BLOCK if how == "script" else "")
        + f"""
def work():
    import json, operator
    import utils
    from models import create_custom_backbone_safe
    import export, training, utils.datasets
    from probe import look
    {SPAWN}
    with context.Pool(1) as pool:
        model = create_custom_backbone_safe("CustomConvNeXt", 3)
        there = [pool.apply(operator.attrgetter("training"), (model,)), pool.apply(look)]
        pool.close()
        pool.join()
    print(json.dumps([look(), *there]))

if __name__ == "__main__":
    work()
"""
    )
    script = strangers.cwd / "script.py"
    script.write_text(code)
    before = snapshot(strangers.cwd)
    run = partial(strangers.run_file, script) if how == "script" else partial(strangers.run, "-c", code)
    (here, trained, there), errors = run()
    assert trained is True
    assert_whole(here, strangers)
    assert_whole(there, strangers)
    assert "logging started" not in errors
    assert snapshot(strangers.cwd) == before


def test_it_works_below_python_m_pytest(strangers: Mount) -> None:
    (strangers.cwd / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\nimport utils\n")
    (strangers.cwd / "test_inner.py").write_text(
        BLOCK + "\ndef test_inner():\n    assert create_custom_backbone_safe('CustomConvNeXt', 3) is not None\n"
    )
    code = """
import contextlib, io, json, os, runpy, sys
sys.path[0], sys.argv = os.getcwd(), ["pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "."]
status = None
with contextlib.redirect_stdout(io.StringIO()) as written:
    try:
        runpy.run_module("pytest", run_name="__main__", alter_sys=True)  # what `-m` does
    except SystemExit as end:
        status = int(end.code)
print(json.dumps([status, written.getvalue()]))
"""
    (status, text), _ = strangers.run_script(code)
    assert status == 0, text


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers_of_every_kind_mount_the_same(foreign: Mount, method: str) -> None:
    _assert_workers(foreign, method)


def test_workers_mount_the_bundled_one(tmp_path: Path) -> None:
    _assert_workers(mount_in(tmp_path, BUNDLED), "spawn")


def _assert_workers(mount: Mount, method: str) -> None:
    """Pools whose first object is a model of BASE-BACK's, or an error of ours; a loader whose first is its data set."""
    code = f"""
def work():
    import json, operator
    from pathlib import Path
    import utils
    from models import BACKBONE_MAP
    from utils.datasets import WindowsCompatibleImageFolder
    from utils.core.errors import UserError
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from probe import look, use

    torch.set_num_threads(1)
    {SPAWN if method == "spawn" else f"import multiprocessing; context = multiprocessing.get_context({method!r})"}

    def in_a_worker(function, argument, then):
        with context.Pool(1) as pool:
            answers = pool.apply(function, (argument,)), pool.apply(then)
            pool.close()
            pool.join()
        return answers

    model = BACKBONE_MAP["CustomConvNeXt"](num_classes=3)
    back, theirs_first = in_a_worker(operator.methodcaller("train"), model, use)
    printed, ours_first = in_a_worker(str, UserError("ours"), look)
    same = type(back) is type(model)
    for name in "ab":
        Path("Data", name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(Path("Data", name, "1.png"))
    images, first = WindowsCompatibleImageFolder("Data"), operator.itemgetter(0)
    batches = list(DataLoader(images, 1, collate_fn=first, num_workers=1, multiprocessing_context=context))
    print(json.dumps([same, printed, ours_first, theirs_first, sorted(label for _, label in batches)]))

if __name__ == "__main__":
    work()
"""
    # A server of forks that has imported torch is that of the tests.
    run = partial(mount.run, "-c") if method == "forkserver" else mount.run_script
    (same, printed, ours_first, theirs_first, labels), errors = run(code)
    assert same is True
    assert printed == "ours"
    assert ours_first["torch"] is (method == "fork")
    assert_whole(theirs_first, mount)
    assert labels == [0, 1]
    assert errors.count("Traceback") == 0
    assert [path.name for path in mount.cwd.iterdir()] == ["Data"]


def test_no_module_of_ours_loads_torch_or_binds(foreign: Mount) -> None:
    files = [file.relative_to(PROJECT).with_suffix("") for file in (PROJECT / "utils").rglob("*.py")]
    names = sorted({".".join(file.parts) for file in files if file.stem not in {"__init__", *TORCH_MODULES}})
    code = f"""
import importlib, json, os, sys
before = dict(os.environ)
from probe import look
found = {{}}
for name in {names!r}:
    importlib.import_module(name)
    seen = look()
    if seen["torch"] or dict(os.environ) != before or any("BASE-BACK" in file for file in seen["files"].values()):
        found[name] = sorted(seen["files"])
        break
print(json.dumps([found, [entry for entry in sys.path if "BASE-BACK" in entry]]))
"""
    printed, _ = foreign.run("-c", code)
    assert printed == [{}, []]


def test_settings_need_no_torch(mount: Mount) -> None:
    code = """
import json
from utils import base_back
from probe import look
settings = base_back.settings()
print(json.dumps([settings.K_FOLDS, str(settings.BASE_DIR), look()]))
"""
    (folds, base_dir, seen), _ = mount.run("-c", code)
    assert (folds, base_dir) == (5, str(mount.workspace))
    assert seen["torch"] is False
    assert seen["path"][-1] == str(mount.base_back / "src")


def test_other_names_are_refused_at_once_and_bind_nothing(foreign: Mount) -> None:
    refused = """
import json
import utils
from probe import look
printed = []
for statement in ("utils.nonsense", "utils.np", "utils.datasets"):
    try:
        getattr(utils, statement.partition(".")[2])
    except AttributeError as error:
        printed.append(str(error))
try:
    import utils.nonsense
except ModuleNotFoundError as error:
    printed.append([type(error).__name__, str(error)])
try:
    from utils import nonsense
except ImportError as error:
    printed.append(type(error).__name__)
seen = look()
"""
    expected = [
        "module 'utils' has no attribute 'nonsense'",
        "module 'utils' has no attribute 'np'",
        "module 'utils' has no attribute 'datasets'",
        ["ModuleNotFoundError", "No module named 'utils.nonsense'"],
        "ImportError",
    ]
    (printed, before), _ = foreign.run("-c", refused + "print(json.dumps([printed, seen]))")
    assert printed == expected
    assert before["torch"] is False
    assert not os.path.isabs(before["base_back"])
    assert all("BASE-BACK" not in entry for entry in before["path"])
    code = refused + "import utils.checkpoint_manager\nprint(json.dumps([printed, look()]))"
    (printed, after), _ = foreign.run_script(code)
    assert printed == expected
    assert_whole(after, foreign)


def test_the_bundled_export_is_there_whatever_is_mounted(mount: Mount) -> None:
    """Its modules stand beside the mounted ones, which answer to their names before and after."""
    code = """
import json, sys
import utils
import config.settings, export, models, utils.datasets
before = {name: id(module) for name, module in sys.modules.items() if name.partition(".")[0] in ("config", "export")}
import torch
from utils import base_back
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval()
ours = base_back.bundled_export()
done = ours.export_and_package_model(
    network, "it", torch.zeros(1, 3, 2, 2), ["state_dict", "onnx"], sys.argv[1], class_names=["a", "b"]
)
same = ours is base_back.bundled_export()
import config.settings, export, models, utils.datasets
from utils import logger
after = {name: id(sys.modules[name]) for name in before}
files = [sys.modules[name].__file__ for name in ("config.settings", "export", "models", "utils.datasets")]
print(json.dumps([done["successful_exports"], same, before == after, files]))
"""
    (done, same, kept, files), _ = mount.run_script(code, str(mount.cwd / "deploy"))
    assert (done, same, kept) == (["state_dict", "onnx"], True, True)
    assert all(file.startswith(os.path.realpath(mount.base_back)) for file in map(os.path.realpath, files))


def test_the_first_use_may_be_a_module_below_utils(foreign: Mount) -> None:
    """Also when the two halves of BASE-BACK's `utils` import one another."""
    foreign.base_back = build(foreign.cwd.parent / "circular")
    with (foreign.base_back / "src" / "utils" / "__init__.py").open("a") as file:
        file.write("from . import datasets\nfrom .checkpoint_manager import CheckpointManager\n")
    code = """
import json
from utils import datasets
from utils import logger
from probe import look
print(json.dumps([datasets.__name__, datasets.logger is logger, look()]))
"""
    (name, same, seen), _ = foreign.run_script(code)
    assert (name, same) == ("utils.datasets", True)
    assert "utils.checkpoint_manager" in seen["files"]
    assert_whole(seen, foreign)


def test_children_are_handed_the_project_before_base_back(foreign: Mount) -> None:
    code = f"""
import importlib, json, sys
import utils
importlib.reload(utils)
sys.path.remove({str(PROJECT)!r})
utils.base_back.bind()
finders = [finder for finder in sys.meta_path if type(finder).__module__ == "utils.base_back"]
print(json.dumps([sys.path[-2:], len(finders)]))
"""
    printed, _ = foreign.run("-c", code)
    assert printed == [[str(PROJECT), str(foreign.base_back / "src")], 1]


def test_a_second_mount_and_a_second_workspace_are_refused(foreign: Mount) -> None:
    other = build(foreign.cwd.parent / "other")
    code = f"""
import json, os
from utils import base_back
from utils.core.errors import UserError
printed = [str(base_back.bind()), str(base_back.bind()), str(base_back.bind({str(foreign.base_back)!r}))]
base_back.bind(workspace="moved")
printed.append(os.environ["DBT_BASE_DIR"])
base_back.settings()
base_back.bind(workspace="moved")
def refused(**asked):
    try:
        base_back.bind(**asked)
    except UserError as error:
        printed.append(str(error))
refused(workspace="elsewhere")
refused(explicit={str(other)!r})
os.environ["BASE_BACK_DIR"] = {str(other)!r}
refused()
print(json.dumps(printed))
"""
    printed, _ = foreign.run("-c", code)
    assert printed[:3] == [str(foreign.base_back)] * 3
    assert printed[3] == str(foreign.cwd / "moved")
    assert len(printed) == 7
    assert f"{foreign.cwd / 'moved'} are loaded" in printed[4]
    assert str(foreign.cwd / "elsewhere") in printed[4]
    for message in printed[5:]:
        assert f"{foreign.base_back} is mounted" in message
        assert f"{other} cannot be mounted" in message


def test_modules_imported_before_from_elsewhere_are_named(foreign: Mount) -> None:
    (foreign.cwd / "config.py").write_text("mine = 1\n")
    (foreign.cwd / "training").mkdir()
    code = """
import json, sys, types
import config, training
sys.modules["export"] = types.ModuleType("export")
import utils
from utils.core.errors import UserError
try:
    from models import BACKBONE_MAP
except UserError as error:
    print(json.dumps([str(error), config.mine, sys.modules["config"] is config]))
"""
    (printed, mine, kept), _ = foreign.run("-c", code)
    for part in (f"config ({foreign.cwd / 'config.py'})", f"training ({foreign.cwd / 'training'})", "export (no file)"):
        assert part in printed
    assert "models (" not in printed
    assert (mine, kept) == (1, True)
