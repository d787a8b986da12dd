"""Ten defects made by hand, and for each a test that fails: `python tests/support/mutations.py [NUMBER ...]`.

Each is patched into a copy of the project, where the test then runs. Prints a table; ends with 0 when every defect was
caught, and with 1 when a test passed in spite of one. `tests/project/test_mutations.py` holds the patches to the
sources.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
LEFT_OUT = (".git", ".venv*", "__pycache__", ".pytest_cache", ".ruff_cache", "debug_tmp", "ensembles")


class Defect(NamedTuple):
    """A patch and who should notice."""

    what: str
    file: str
    old: str
    new: str
    test: str


DEFECTS = (
    Defect(
        "a file that is written in place, not renamed",
        "utils/core/artifacts.py",
        "        yield temporary\n        umask",
        "        yield path\n        path.replace(temporary)\n        umask",
        "tests/core/test_artifacts.py",
    ),
    Defect(
        "out-of-fold rows mixed up",
        "utils/predictions/store.py",
        '        arrays["logits"],\n        np.ones',
        '        arrays["logits"][::-1],\n        np.ones',
        "tests/discovery/test_imported_members.py tests/discovery/test_import_predictions.py",
    ),
    Defect(
        "the order of classes ignored",
        "utils/discovery/imported_members.py",
        "columns = np.array([column_of[name] for name in classes])",
        "columns = np.arange(len(classes))",
        "tests/discovery/test_imported_members.py tests/discovery/test_import_predictions.py",
    ),
    Defect(
        "BatchNorm not recomputed",
        "utils/networks/soups.py",
        "                model(images.to(device))\n",
        "",
        "tests/networks/test_soups.py",
    ),
    Defect(
        "the exported combiner without its temperature",
        "utils/combiners/heads.py",
        "torch.tensor(shares / temperature, dtype",
        "torch.tensor(shares, dtype",
        "tests/combiners/test_weighting.py",
    ),
    Defect(
        "no lock",
        "utils/core/locks.py",
        "        _take(lock, record)\n    except",
        "        pass\n    except",
        "tests/core/test_locks.py",
    ),
    Defect(
        "a member's name that leads out of its folder",
        "utils/predictions/catalog_records.py",
        "    if not is_name(name):",
        "    if False:",
        "tests/faults -k leads",
    ),
    Defect(
        "contaminated results returned by name",
        "utils/evaluation/evaluation_results.py",
        "if fitted and not inputs.settings.allow_contaminated",
        "if False and not inputs.settings.allow_contaminated",
        "tests/faults -k fitted",
    ),
    Defect(
        "a checkpoint unpickled without an allow-list",
        "utils/networks/checkpoints.py",
        "weights_only=True",
        "weights_only=False",
        "tests/project/test_security.py tests/faults -k hostile",
    ),
    Defect(
        "the last calibration bin open at 1",
        "utils/numeric/metrics.py",
        'confidence, side="left")',
        'confidence, side="right")',
        "tests/numeric/test_metrics.py",
    ),
    Defect(
        "debug writes beside the trained members",
        "utils/operations/debug_sandbox.py",
        '("--workspace", str(workspace.base), "--output", str(folder)), ())',
        '("--workspace", str(workspace.base)), ())',
        "tests/operations/test_debug.py -k 'beside or damaged'",
    ),
    Defect(
        "an archive with overflowing sizes is accepted",
        "utils/core/array_archives.py",
        "    if any(extent < 0 for extent in shape) or math.prod(shape) * max(dtype.itemsize, 1) != n_bytes:",
        "    if False:",
        "tests/core/test_array_archives.py tests/predictions/test_prediction_files.py",
    ),
)


def is_caught(defect: Defect) -> bool:
    """Whether the test fails in a copy that has the defect."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        copy = Path(name) / "project"
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        path = copy / defect.file
        text = path.read_text(encoding="utf-8")
        if text.count(defect.old) != 1:
            raise ValueError(f"{defect.file}: {text.count(defect.old)} times {defect.old!r}; expected once")
        path.write_text(text.replace(defect.old, defect.new), encoding="utf-8")
        line = f"-m pytest -q -x -n 0 -p no:cacheprovider --basetemp {name}/pytest {defect.test}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
        done = subprocess.run(
            [sys.executable, *shlex.split(line)], cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1):  # 1: tests failed; all else is no verdict
            raise RuntimeError(f"{defect.what}: pytest ended with {done.returncode}: {done.stdout[-1500:]}")
        return done.returncode == 1


def main(chosen: list[int]) -> int:
    """Try the defects; the exit code."""
    missed = 0
    for number, defect in enumerate(DEFECTS, start=1):
        if chosen and number not in chosen:
            continue
        caught = is_caught(defect)
        missed += not caught
        print(f"{number:2}  {'caught' if caught else 'MISSED'}  {defect.what:62}  {defect.test}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]]))
