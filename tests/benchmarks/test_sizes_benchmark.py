"""The benchmark of large imports, on a small one: every command does what its row says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import sizes
from conftest import PROJECT


def test_a_growth_is_the_exponent_and_unknown_for_what_takes_no_time():
    def cost(cpu_seconds, code=0):
        return sizes.Cost(0.0, cpu_seconds, 0.0, code, "")

    assert sizes.growth(cost(40), cost(10)) == 2
    assert sizes.growth(cost(40), cost(sizes.SMALL / 2)) is None
    assert sizes.growth(cost(40, code=-9), cost(10)) is None


MEASURED = """
import json, sizes
costs = sizes.measured(sizes.Size(members=6, classes=4, rows=120), sizes.COMMANDS, limit=120)
print(json.dumps({what: [cost.code, cost.output] for what, cost in costs.items()}))
"""


@pytest.mark.slow
def test_every_command_ends_as_expected():
    # In a process of its own, as costs are those of the children of a process.
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=PROJECT / "benchmarks", capture_output=True, text=True, check=True
    )
    costs = json.loads(done.stdout.splitlines()[-1])
    assert costs.keys() == {"import-predictions", *sizes.COMMANDS}
    assert {what: output for what, (code, output) in costs.items() if code not in sizes.EXPECTED} == {}
