"""Every combiner in the families' tables exported with its members and compared in the files' own runtimes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from battery_networks import SIDE, WIDTHS, N, Small
from combiner_cases import FACTS, QUICK, C, M
from torch import nn

from utils.building.ensembles import COMBINERS
from utils.combiners.protocol import combiner_inputs
from utils.exporting import export_formats, program_archives
from utils.exporting.parity_check import FileOutputs, ReferenceBatches, compare_outputs, make_batches
from utils.exporting.runtimes import RUNTIMES
from utils.networks.ensemble_network import EnsembleNetwork, MemberNetworks
from utils.networks.preprocessing import Preprocessing
from utils.predictions.rows import MemberOutputs

PREPROCESSING = Preprocessing.of_base_pipeline(SIDE)
CLASSES = ("leaf, spotted", 'the "healthy" one', "zdravý 葉")


@pytest.fixture(scope="module")
def members():
    """Networks, real rows of noise in [0, 1], and what the networks give for them."""
    networks = [Small(seed, width).eval() for seed, width in enumerate(WIDTHS)]
    parts = [MemberNetworks(f"m{place}", [network], PREPROCESSING, range(C)) for place, network in enumerate(networks)]
    images = np.random.default_rng(3).random((N, 3, SIDE, SIDE), dtype=np.float32)
    network = EnsembleNetwork(parts, _Everything(), embeds=True)
    with torch.no_grad():
        logits, embeddings = network(torch.from_numpy(images))
    outputs = MemberOutputs(
        logits.numpy().transpose(1, 0, 2), tuple(np.split(embeddings.numpy(), np.cumsum(WIDTHS)[:-1], 1))
    )
    labels = outputs.logits.mean(axis=0).argmax(axis=1)
    labels[::5] = (labels[::5] + 1) % C
    return parts, images, outputs, labels


class _Everything(nn.Module):
    def forward(self, logits, embeddings):
        return logits, torch.cat(embeddings, dim=1)


@pytest.fixture(scope="module", params=sorted(COMBINERS))
def fitted(request, members, small_forests, short_paths):
    """(combiner, what it reads)"""
    _, _, outputs, labels = members
    combiner = partial(COMBINERS[request.param].configured, QUICK, FACTS)()
    seen = combiner_inputs(combiner, outputs)
    return combiner.fit(seen, labels, np.arange(N) % 3), seen


def network_of(members, combiner):
    is_discontinuous = combiner.is_discontinuous
    return EnsembleNetwork(
        members[0], combiner.to_module(), embeds=combiner.reads_embeddings, member_outputs=is_discontinuous
    )


def probe_of(members, combiner, seen):
    is_discontinuous = combiner.is_discontinuous
    batches, rows = make_batches([(image,) for image in members[1]])
    found = ReferenceBatches(batches, rows, combiner.predict_proba(seen))
    if not is_discontinuous:
        return found
    embeddings = seen.embeddings if combiner.reads_embeddings else None
    return replace(found, member_logits=members[2].logits, member_embeddings=embeddings, combiner=combiner)


def answers_of(kind: str, path: Path, probe: ReferenceBatches, outputs) -> FileOutputs:
    run, _ = RUNTIMES[kind](path, {"outputs": list(outputs)})
    found = [run(*batch) for batch in probe.batches]
    joined = {name: np.concatenate([parts[place] for parts in found]) for place, name in enumerate(outputs)}
    return FileOutputs(np.concatenate(probe.rows), joined)


def test_its_files_answer_as_it_does(fitted, members, tmp_path):
    combiner, seen = fitted
    check_files(combiner, seen, members, tmp_path / "it", ("torchscript", "onnx"), "tracing")


@pytest.mark.slow
def test_its_files_by_torch_export_answer_as_it_does(fitted, members, tmp_path):
    combiner, seen = fitted
    check_files(combiner, seen, members, tmp_path / "it", ("exported_program", "onnx"), "dynamo")
    assert program_archives.program_problem(tmp_path / "it" / "exported_program" / "it.pt2") is None
    metadata = onnxruntime.InferenceSession(tmp_path / "it" / "onnx" / "it.onnx").get_modelmeta().custom_metadata_map
    assert metadata["exporter"].endswith("dynamo=True")


def check_files(combiner, seen, members, staged, kinds, exporter):
    network, probe = network_of(members, combiner), probe_of(members, combiner, seen)
    network.parity_tolerance, network.onnx_exporter = 1.0, exporter
    done = export_formats.write_packaged_formats(
        network, "it", kinds, staged, torch.from_numpy(probe.batches[0][0]), {"made": "here"}, CLASSES
    )
    for kind in kinds:
        assert done[kind]["status"] == "ok", done[kind]["reason"]
        outcome = compare_outputs(probe, answers_of(kind, staged / done[kind]["path"], probe, network.output_names))
        assert outcome["passed"], (kind, outcome)
        assert outcome["parity"]["rows"] == N
        assert outcome["parity"]["batch_sizes"] == [1, 3, 17]


def test_what_has_steps_says_so(fitted, members):
    """A tiny change of the members' logits changes little, unless the combiner says that it jumps."""
    combiner, seen = fitted
    if combiner.is_discontinuous:
        return
    logits = members[2].logits
    before = combiner.predict_proba(seen)
    for place in range(0, M * C):
        shift = np.zeros((M, 1, C), dtype=np.float32)
        shift[place // C, 0, place % C] = 1e-3
        moved = replace(seen, logits=logits + shift) if isinstance(seen, MemberOutputs) else logits + shift
        assert np.abs(combiner.predict_proba(moved) - before).max() < 0.05
