"""Workspaces of imported members under any name, as versions without a rule for names could leave them."""

from __future__ import annotations

import json
from pathlib import Path

from given_predictions import content, write
from in_process import run

VOTES = ("--set", "runs.score_ensemble.methods=[soft_voting,hard_voting]", "--set", "runs.model_soup.enable=false")
VOTES += ("--set", "pruning.enable=false", "--quiet")


def imported(folder: Path, *members: str) -> Path:
    """A workspace of imported members; a name that is refused today is given to one as older versions did."""
    workspace, seeds = folder / "w", {name: seed for seed, name in enumerate(members, start=1)}
    workspace.mkdir(parents=True)
    given = write(folder / "given", {f"member{seed}": seed for seed in seeds.values()})
    done = run("import-predictions", "--from", given, workspace=workspace)
    assert done.code == 0, done.stderr
    ours = workspace / "ensembles"
    place = ours / "ensemble_catalog.json"
    record = json.loads(place.read_text())
    for name, seed in seeds.items():
        record["members"][name] = record["members"].pop(f"member{seed}")
        record["members"][name]["oof"]["path"] = f"ensembles/oof_predictions/{name}.npz"
        (ours / "oof_predictions" / f"member{seed}.npz").rename(ours / "oof_predictions" / f"{name}.npz")
        for kind in ("predictions", "fusion_embeddings"):
            (ours / kind / f"member{seed}").rename(ours / kind / name)
    for path in ours.rglob("*record.json"):
        entry = json.loads(path.read_text())
        new = path.relative_to(ours).parts[1]
        path.write_text(json.dumps(entry | {"member": new}, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    place.write_text(json.dumps(record))
    return workspace


def stored(workspace: Path) -> dict[Path, bytes]:
    """Everything that lies under members' names."""
    return {
        path: data
        for path, data in content(workspace / "ensembles").items()
        if path.parts[0] in ("predictions", "oof_predictions", "fusion_embeddings")
    }
