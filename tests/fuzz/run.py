"""Hostile input, many times: `python tests/fuzz/run.py N [SEED [KIND ...]]`; `make fuzz N=100000`.

One process under an address-space limit and an alarm. Every case ends well or with an error of the project's own
(exit codes 1 to 4), within ten seconds of processor time and a minute on the clock, since other programs may need the
processor too, in two gigabytes, and leaves nothing beside its workspace. The first that does
not ends the run with 1, and is shown made small. Named kinds, such as `"records of exports"`, are run alone, each with
its percentage of N.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
FOLDERS = (HERE.parents[2], HERE.parents[1], HERE.parents[1] / "support", HERE.parents[1] / "attacks", HERE.parent)
sys.path[:0] = [str(folder) for folder in FOLDERS]
os.environ |= {"OMP_NUM_THREADS": "1", "DBT_MODEL_SIZE": "tiny"}
os.environ.setdefault("DBT_BASE_DIR", tempfile.gettempdir())

import cases  # noqa: E402
import later_files  # noqa: E402
import numpy as np  # noqa: E402
from given_predictions import arrays, write  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from in_process import run  # noqa: E402

from utils import base_back  # noqa: E402
from utils.building import ensembles  # noqa: E402
from utils.core.errors import OrchestratorError  # noqa: E402
from utils.core.workspace import Workspace  # noqa: E402
from utils.predictions import folds  # noqa: E402

GIGABYTES, SECONDS, MINUTE = 2, 10, 60
PERCENTAGES = {
    "configurations": 28,
    "predictions": 15,
    "catalogs": 10,
    "records": 7,
    "boosters": 4,
    "tensors": 5,
    "images": 5,
    "onnx files": 8,
    "records of exports": 5,
    "answers": 6,
    "recovery states": 3,
    "command lines": 4,
}
"""Per cent of the cases."""
TYPED = (0, 1, 2, 3, 4)
NAMES = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "cache", "logs")
STACK = ("--set", "runs.stacking.meta_learners=[xgb]", "--set", "runs.stacking.xgb_config.n_estimators=2")
counts: Counter[str] = Counter()


class HangError(Exception):
    """A case that took too long."""


def _hang(number: int, _: object) -> None:
    limit = f"{SECONDS} s of processor time" if number == signal.SIGPROF else f"{MINUTE} s"
    raise HangError(f"a case took more than {limit}")


@contextmanager
def watched(folder: Path, kind: str) -> Iterator[None]:
    """One case: its alarms, and a look at what lies beside the workspace afterwards."""
    before = sorted(path.name for path in folder.iterdir())
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(MINUTE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    after = sorted(path.name for path in folder.iterdir())
    assert after == before, f"left beside the workspace: {sorted(set(after) - set(before))}"
    counts[kind] += 1


def typed(code: int, message: str) -> None:
    assert code in TYPED, f"exit code {code}: {message[-2000:]}"


def main(n_cases: int, start: int, only: Collection[str] = ()) -> int:
    """Run all kinds, or some `only`; the exit code."""
    if unknown := set(only) - PERCENTAGES.keys():
        raise SystemExit(f"no such kind: {', '.join(sorted(unknown))}; expected some of {', '.join(PERCENTAGES)}")
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, _hang)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        os.chdir(folder)
        kinds = prepare(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (GIGABYTES << 30),) * 2)
        for kind, (strategy, look) in kinds.items():
            if only and kind not in only:
                continue
            count = max(1, n_cases * PERCENTAGES[kind] // 100)
            fuzzed(kind, folder, strategy, look, count, start)
    total = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    print(f"fuzz: {sum(counts.values())} cases, seed {start}, none failed ({total})")
    return 0


def fuzzed(kind: str, folder: Path, strategy: Any, look: Callable[[Any], None], count: int, start: int) -> None:
    """Give `look` this many examples of a strategy; the screen is told when that is done, as a long run takes hours."""

    @seed(start)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def case(example: Any) -> None:
        with watched(folder, kind):
            look(example)

    case()
    print(f"{kind}: {counts[kind]} cases, none failed", file=sys.stderr, flush=True)


Readers = dict[str, tuple[Any, Callable[[Any], None]]]
"""{kind: (strategy, what is done with an example)}"""


def prepare(folder: Path) -> Readers:
    """Every reader, and the valid files that are spoilt for them."""
    empty, imported, given_folder = folder / "empty", folder / "imported", folder / "given"
    for place in (empty, imported):
        place.mkdir()
    write(given_folder)
    assert run("import-predictions", "--from", given_folder, workspace=imported).code == 0
    folds.CROSSFIT_FOLDS = 3  # nested fits of five took most of every build
    printed = ("--config", "configs/ensemble_config.yaml")
    for line in (("build-ensemble", "--config", "configs/votes.yaml"), ("stack", *printed, *STACK)):
        done = run(*line, workspace=imported)
        assert done.code == 0, done.stderr
    workspace = Workspace(imported, *(imported / name for name in NAMES))
    of_commands = given_to_commands(folder / "given.yaml", given_folder, empty, workspace)
    readers = of_commands | kept_of_an_ensemble(workspace) | decoded(folder / "image", empty)
    return readers | later_files.readers(folder, workspace.base, typed)


def given_to_commands(file: Path, given_folder: Path, empty: Path, workspace: Workspace) -> Readers:
    """What commands read: a configuration, predictions of others, a catalog."""
    catalog_text = workspace.catalog.read_text()
    file.touch()

    def config(content: bytes) -> None:
        file.write_bytes(content)
        done = run("clean", "--quiet", "--config", file, workspace=empty)
        typed(done.code, done.stderr)

    def prediction(content: bytes) -> None:
        target = given_folder / "forest" / "val.npz"
        target.write_bytes(content)
        shutil.rmtree(empty)
        empty.mkdir()
        done = run("import-predictions", "--quiet", "--from", given_folder, workspace=empty)
        typed(done.code, done.stderr)

    def catalog(document: Any) -> None:
        workspace.catalog.write_text(json.dumps(document))
        try:
            for line in (("status",), ("build-ensemble", "--config", "configs/votes.yaml")):
                done = run(*line, "--quiet", workspace=workspace.base)
                typed(done.code, done.stderr)
        finally:
            workspace.catalog.write_text(catalog_text)

    return {
        "configurations": (cases.configurations(), config),
        "predictions": (cases.predictions(arrays("val", 2)), prediction),
        "catalogs": (cases.documents(json.loads(catalog_text)), catalog),
    }


def kept_of_an_ensemble(workspace: Workspace) -> Readers:
    """What an ensemble is loaded from: its record, a booster, tensors."""
    place = workspace.ensemble("stacking_xgb")
    texts = {path.name: path.read_bytes() for path in place.iterdir()}

    def record(document: Any) -> None:
        (place / "ensemble.json").write_text(json.dumps(document))
        loaded(answers=False)

    def booster(document: Any) -> None:
        content = json.dumps(document).encode()
        found = json.loads(texts["ensemble.json"])
        found["texts"]["booster.json"]["sha256"] = hashlib.sha256(content).hexdigest()
        (place / "ensemble.json").write_text(json.dumps(found))
        (place / "booster.json").write_bytes(content)
        loaded()

    def tensor(content: bytes) -> None:
        (place / "combiner.safetensors").write_bytes(content)
        loaded()

    def loaded(*, answers: bool = True) -> None:
        """The ensemble loads and answers, or says why not."""
        try:
            with contextlib.suppress(OrchestratorError):
                found = ensembles.load(workspace, "stacking_xgb")
                shape = (len(found.members), 2, len(found.classes))
                if answers:
                    found.combiner.predict_proba(np.zeros(shape, dtype=np.float32))
        finally:
            for name, content in texts.items():
                (place / name).write_bytes(content)

    return {
        "records": (cases.documents(json.loads(texts["ensemble.json"])), record),
        "boosters": (cases.documents(json.loads(texts["booster.json"])), booster),
        "tensors": (cases.tensors(texts["combiner.safetensors"]), tensor),
    }


def decoded(shown: Path, empty: Path) -> Readers:
    """Image files."""
    decoder = base_back.load_bundled("image_cache")

    def image(content: bytes) -> None:
        shown.write_bytes(content)
        cache = empty / "image_cache"
        with contextlib.suppress(decoder.UnreadableImages):
            digest = hashlib.sha256(content).hexdigest()
            decoder.decode_images([shown], [digest], [decoder.Resizing(32, 36)], cache, threads=1)
        shutil.rmtree(cache, ignore_errors=True)

    shown.touch()
    return {"images": (images(), image)}


def images() -> Any:
    """Small images of every kind that is read, spoilt."""
    from hypothesis import strategies as st
    from PIL import Image

    valid = []
    for form in ("PNG", "JPEG", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, form)
        valid.append(buffer.getvalue())
    return st.one_of(*(cases.spoilt(content) for content in valid), st.binary(max_size=60))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3:]))
