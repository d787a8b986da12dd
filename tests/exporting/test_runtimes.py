"""The script that runs exported files of one format."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from utils.exporting import runtimes


class Doubled(torch.nn.Module):
    """Gives its input doubled, and the sums of its rows."""

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * values, values.sum(dim=1)


def job_of(tmp_path, path) -> str:
    np.savez(tmp_path / "batches.npz", batch_0000=np.ones((1, 2), np.float32), batch_0001=np.eye(2, dtype=np.float32))
    job = {"format": "torchscript", "files": [str(path)], "outputs": ["doubled", "sums"]}
    job |= {"batches": str(tmp_path / "batches.npz"), "results": str(tmp_path / "results.npz")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    return str(tmp_path / "job.json")


def test_outputs_of_every_batch_are_named_and_facts_are_recorded(tmp_path):
    torch.jit.trace(Doubled(), torch.zeros(1, 2)).save(tmp_path / "it.pt")
    runtimes.main(job_of(tmp_path, tmp_path / "it.pt"))
    with np.load(tmp_path / "results.npz") as results:
        np.testing.assert_array_equal(results["0/batch_0001/doubled"], 2 * np.eye(2))
        np.testing.assert_array_equal(results["0/batch_0000/sums"], [2])
        facts = json.loads(str(results["facts"]))
    assert [fact["versions"].keys() for fact in facts] == [{"torch"}]
    assert facts[0]["latency_ms"] >= 0


def test_a_file_that_does_not_run_is_named(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no archive")
    with pytest.raises(RuntimeError, match=r"^broken\.pt: "):
        runtimes.main(job_of(tmp_path, tmp_path / "broken.pt"))


def test_the_warm_up_run_is_not_part_of_the_latency():
    batches = []
    latency = runtimes.measure_latency_ms(lambda batch: batches.append(batch) or [batch], [np.zeros(1)], seconds=0.0)
    assert len(batches) == 2
    assert latency >= 0
