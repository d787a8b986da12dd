"""A signal ends a command wherever it arrives."""

from __future__ import annotations

import signal

import pytest
from conftest import run_python

IN_A_CALLBACK = """
import os, signal, sys, time, weakref
import ensemble_orchestrator
from utils.core.results import Result

class Thing: pass

def busy(*_):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.{sent}))
    del thing
    for _ in range(100):
        time.sleep(0.1)
    return Result("went on", {{}})

ensemble_orchestrator._prepared_call = busy
sys.exit(ensemble_orchestrator.main(["status"]))
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_a_callback_that_ignores_exceptions(sent, code):
    done = run_python("-c", IN_A_CALLBACK.format(sent=sent.name))
    assert "went on" not in done.stdout
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_other_ignored_exceptions_are_shown():
    code = """
import sys, ensemble_orchestrator
from utils.core.results import Result
class Bad:
    def __del__(self): raise ValueError("shown")
def busy(*_):
    Bad()
    return Result("done", {})
ensemble_orchestrator._prepared_call = busy
sys.exit(ensemble_orchestrator.main(["status"]))
"""
    done = run_python("-c", code)
    assert done.returncode == 0
    assert "ValueError: shown" in done.stderr
