"""Jobs for spawned workers, which import this module: a test module costs them a third of a second more."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np

from utils.core import engines, worker_processes
from utils.core.artifacts import replacing
from utils.core.errors import UserError


def with_process(shared, item):
    return shared.sum() + item, os.getpid()


def slow_with_process(shared, item):
    time.sleep(0.3)
    return with_process(shared, item)


def with_thread(item):
    time.sleep(0.02)
    return item, threading.get_ident()


def n_threads_inside(wanted):
    return len({thread for _, thread in engines.Local().map(with_thread, range(wanted), n_threads=wanted)})


def with_jobs_inside(item):
    """The processes of jobs that a job starts, and the number of threads that it gets for others."""
    local = engines.Local()
    processes = {process for _, process in local.map(with_process, range(3), shared=(np.zeros(1),), n_processes=2)}
    return processes == {os.getpid()}, n_threads_inside(8)


def waits_to_be_alone(long, began, item):
    """The jobs beside the `long` one, and the threads that it gets, before and after the other has ended.

    The other ends when the file `began` shows that the long one has counted.
    """
    before = worker_processes.n_side_by_side()
    if item == long:
        began.touch()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (
        worker_processes.n_side_by_side() > 1 if item == long else not began.exists()
    ):
        time.sleep(0.01)
    return before, worker_processes.n_side_by_side(), n_threads_inside(4)


def started_at(item):
    """The process and the time of a job, which is long enough for every process to take one."""
    started = time.monotonic()
    time.sleep(0.2)
    return item, os.getpid(), started


def killed_in_a_worker(folder, here, item):
    """Jobs end their worker by SIGKILL, as running out of memory would."""
    Path(folder, f"{item}.{os.getpid()}").touch()
    if os.getpid() != here:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return item


def waits_in_a_worker(folder, here, item):
    if os.getpid() != here:
        with replacing(Path(folder, "result")):
            Path(folder, str(os.getpid())).touch()
            time.sleep(600)
    while not any(path.name.isdecimal() for path in Path(folder).iterdir()):
        time.sleep(0.02)
    raise UserError("refused here")


def trained(item):
    """The weights of a small network after a few steps."""
    import torch

    torch.manual_seed(item)
    network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(network.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        network(torch.randn(512, 64)).square().mean().backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach().numpy()
