"""Cost of the evaluated models: latencies, measured if they are not stored yet, and sizes of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.building import latency
from utils.building.ensembles import Ensemble
from utils.core.errors import UserError
from utils.evaluation import scoring
from utils.evaluation.scoring import ScoredModel
from utils.predictions import fold_networks
from utils.predictions.catalog import IMPORTED
from utils.predictions.rows import MemberRows
from utils.predictions.store import Store


@dataclass(frozen=True)
class Costs:
    """Latencies and file sizes of the evaluated models."""

    latencies: Mapping[str, latency.Record]
    """{member: latency of its network}"""
    combiners: Mapping[str, latency.Record]
    """{ensemble: latency of its combiner}"""
    unmeasured: Mapping[str, str]
    """{member or ensemble: why there is no latency}"""
    sizes: Mapping[str, int | None]
    """{model: bytes of its checkpoints and its combiner}; None if a file is missing"""
    missing_files: Mapping[str, Sequence[str]]
    """{model: names of missing files}"""


def measure_costs(
    store: Store,
    models: Sequence[ScoredModel],
    saved: Mapping[str, Ensemble],
    split: str,
    embedded: dict[str, MemberRows],
) -> Costs:
    """Return latencies, measured if they are not stored yet, and sizes; imported members have neither.

    `embedded` caches {member: its rows of the split with embeddings}, see `open_embedded`.
    """
    catalogued = store.catalog.members
    measurable = [model for model in models if all(catalogued[name].source != IMPORTED for name in model.members)]
    members = [catalogued[name] for name in sorted({name for model in measurable for name in model.members})]
    latencies: dict[str, latency.Record] = {}
    try:
        unmeasured = scoring.for_each_member(members, lambda batch: latencies.update(latency.measure(store, batch)))
    except UserError as error:
        unmeasured = {member.name: str(error) for member in members}
    combiners = {
        model.name: latency.measure_combiner(
            store,
            saved[model.name].inputs_digest,
            model.name,
            saved[model.name].combiner.to_module,
            (len(model.members), model.probabilities.shape[1]),
            _embedding_widths(store, saved[model.name], split, embedded),
        )
        for model in measurable
        if model.kind == "ensemble"
    }
    files = {model.name: _files(store, model) for model in measurable}
    missing = {name: [path.name for path in paths if not path.is_file()] for name, paths in files.items()}
    sizes = {
        name: None if missing[name] else sum(path.stat().st_size for path in paths) for name, paths in files.items()
    }
    return Costs(latencies, combiners, unmeasured, sizes, {name: names for name, names in missing.items() if names})


def _embedding_widths(store: Store, ensemble: Ensemble, split: str, embedded: dict[str, MemberRows]) -> list[int]:
    """Return the widths (M,) of the members' embeddings if the combiner reads them; else an empty list."""
    if not ensemble.combiner.reads_embeddings:
        return []
    parts = open_embedded(store, ensemble.members, split, embedded)
    return [part.embeddings.shape[1] for part in parts.values() if part.embeddings is not None]


def _files(store: Store, model: ScoredModel) -> list[Path]:
    """Return the checkpoints that predict for a model, and the files of its combiner."""
    files = []
    for name in model.members:
        checkpoints = store.catalog.members[name].checkpoints
        stages = [
            stage or checkpoints[0]["stage"]
            for stage in fold_networks.answering(store.catalog.members[name], model.inference)
        ]
        files += [store.workspace.base / entry["path"] for entry in checkpoints if entry["stage"] in stages]
    if model.kind == "ensemble":
        folder = store.workspace.ensemble(model.name)
        files += [folder / "combiner.safetensors", *sorted(folder.glob("*booster.json"))]
    return files


def open_embedded(
    store: Store, members: Sequence[str], split: str, embedded: dict[str, MemberRows]
) -> dict[str, MemberRows]:
    """Return {member: its rows of a split with embeddings}; members missing in the cache `embedded` are added to it."""
    for name in members:
        if name not in embedded:
            embedded[name] = store.rows(store.catalog.members[name], split, embeddings=True)
    return {name: embedded[name] for name in members}
