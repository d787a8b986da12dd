"""Five hundred hostile files in one process; `make fuzz` feeds two thousand, `make fuzz N=100000` more."""

from __future__ import annotations

import os
import re
from pathlib import Path

from conftest import run_python

CASES = int(os.environ.get("FUZZ_CASES", "500"))


def test_no_input_does_more_than_to_be_refused(tmp_path):
    done = run_python(str(Path(__file__).parent / "run.py"), str(CASES), environment={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-6000:]
    found = re.search(r"fuzz: (\d+) cases, seed 0, none failed", done.stdout)
    assert found, done.stdout
    assert int(found.group(1)) >= CASES
    print(done.stdout)
