"""Write the pictures of the documentation: the report in light, in dark and on a phone, and the terminal.

    python scripts/screenshots.py               five classifiers of scikit-learn on its handwritten digits
    python scripts/screenshots.py WORKSPACE     an evaluated workspace whose images may be published

Needs Chromium, which `scripts/chromium.sh` provides. The pictures go to docs/pictures.
"""

from __future__ import annotations

import html
import io
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]
PICTURES = PROJECT / "docs" / "pictures"
REPORT = {
    "report_light": (1120, 1000, "light"),
    "report_dark": (1120, 1000, "dark"),
    "report_phone": (400, 860, "light"),
}
"""{picture: width and height in pixels, colour scheme}"""
COMMAND = ("evaluate",)
SETTINGS = (
    *("backbones.include=all", "exports.enable=false", "runs.stacking.enable=true", "runs.stacking.meta_learners=[lr]"),
    "runs.score_ensemble.methods=[soft_voting,weighted,greedy_selection,soft_voting_calibrated]",
)
FOLDS = 5
COLUMNS, LINES = 100, 44
COLOURS = 64
"""Of a picture: text needs few, and the files stay small"""
TERMINAL = """<!DOCTYPE html><meta charset="utf-8"><style>
@font-face {{ font-family: terminal; src: url("{font}"); }}
body {{ margin: 0; padding: 1rem 1.2rem; background: #16181d; color: #dfe3ea; width: max-content; }}
pre {{ margin: 0; font: 13px/1.45 terminal, monospace; }}
b {{ color: #fff; }} i {{ font-style: normal; color: #7ddba9; }}
</style><pre>{text}</pre>"""


def main(argv: Sequence[str] | None = None) -> int:
    """Take the pictures; returns 1 where there is no browser or no report."""
    arguments = sys.argv[1:] if argv is None else argv
    import browser

    if browser.found() is None:
        print("no Chromium; scripts/chromium.sh provides one where apt or npm can", file=sys.stderr)
        return 1
    if arguments:
        return take(Path(arguments[0]).expanduser().resolve())
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "digits"
        build(workspace)
        return take(workspace)


def build(workspace: Path) -> None:
    """A workspace with the digits, and with predictions of classifiers that are fitted on their pixels."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from utils.operations.demo import write_digits

    workspace.mkdir()
    write_digits(workspace / "Data")
    run("BASE-BACK/src/main.py", "--stages", "split", "--data", str(workspace / "Data"), workspace=workspace)
    rows = {split: read_split(workspace, split) for split in ("train", "val", "test")}
    pixels, labels, _ = rows["train"]
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    folds = np.empty(len(labels), dtype=int)
    for number, (_, held_out) in enumerate(splitter.split(pixels, labels)):
        folds[held_out] = number
    for name, model in {
        "bayes": GaussianNB(var_smoothing=1e-2),
        "forest": RandomForestClassifier(60, random_state=0),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=500)),
        "neighbours": KNeighborsClassifier(9),
        "small_forest": RandomForestClassifier(15, max_depth=8, random_state=1),
    }.items():
        out_of_fold = cross_val_predict(model, pixels, labels, cv=splitter, method="predict_proba")
        model.fit(pixels, labels)
        found = {split: model.predict_proba(rows[split][0]) for split in ("val", "test")}
        store(workspace, name, "oof", out_of_fold, rows["train"], fold=folds)
        for split, probabilities in found.items():
            store(workspace, name, split, probabilities, rows[split])
    run("ensemble_orchestrator.py", "import-predictions", "--from", str(workspace / "given"), workspace=workspace)
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    run("ensemble_orchestrator.py", "pipeline", "--config", "configs/votes.yaml", *settings, workspace=workspace)


def read_split(workspace: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (N, 64), labels (N,) and ids `digit/number.png` (N,)."""
    from PIL import Image

    paths = sorted((workspace / "split_dataset" / split).glob("*/*.png"))
    images = [Image.open(path, formats=["PNG"]).convert("L") for path in paths]
    pixels = np.stack([np.asarray(image, dtype=float).ravel() for image in images])
    return (
        pixels,
        np.array([int(path.parent.name) for path in paths]),
        np.array([f"{path.parent.name}/{path.name}" for path in paths]),
    )


def store(workspace: Path, name: str, stem: str, probabilities: np.ndarray, rows: Any, **more: np.ndarray) -> None:
    """One file of predictions as `import-predictions` reads it."""
    _, labels, ids = rows
    folder = workspace / "given" / name
    folder.mkdir(parents=True, exist_ok=True)
    classes = np.array([str(digit) for digit in range(10)])
    mixed = 0.99 * probabilities + 0.01 / 10  # a forest and neighbours give probabilities of 0
    np.savez(folder / f"{stem}.npz", probabilities=mixed, labels=labels, sample_ids=ids, classes=classes, **more)


def run(program: str, *words: str, workspace: Path) -> None:
    """Run one of the project's programs. Raises CalledProcessError where it fails."""
    command = [sys.executable, str(PROJECT / program), *words, "--workspace", str(workspace)]
    subprocess.run(command, check=True, cwd=PROJECT, stdout=subprocess.DEVNULL)


def take(workspace: Path) -> int:
    """Take the pictures of a workspace; returns 1 where it has no report."""
    import browser

    report = workspace / "ensembles" / "report" / "index.html"
    if not report.is_file():
        print(f"{report}: no report; expected an evaluated workspace", file=sys.stderr)
        return 1
    PICTURES.mkdir(exist_ok=True)
    with browser.Browser() as chromium:
        for name, (width, height, scheme) in REPORT.items():
            chromium.open(report, width=width, height=height, scheme=scheme)
            save(name, chromium.picture({"x": 0, "y": 0, "width": width, "height": height, "scale": 1}))
        with tempfile.TemporaryDirectory() as scratch:
            page = Path(scratch) / "terminal.html"
            page.write_text(terminal_page(workspace), encoding="utf-8")
            chromium.open(page, width=1200)
            width, height = chromium.run("[document.body.scrollWidth, document.body.scrollHeight]")
            save("terminal", chromium.picture({"x": 0, "y": 0, "width": width, "height": height, "scale": 1}))
    return 0


def terminal_page(workspace: Path) -> str:
    """A page that looks like a terminal of 100 columns in which a command has just run."""
    import matplotlib

    words = [*COMMAND, "--workspace", str(workspace)]
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm"}
    # `script` gives the command a terminal, so that its table has the form that a terminal gets.
    line = shlex.join([sys.executable, str(PROJECT / "ensemble_orchestrator.py"), *words])
    done = subprocess.run(
        ["script", "-qec", f"stty cols {COLUMNS}; {line} 2>/dev/null", "/dev/null"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    shown = shlex.join(["python", "ensemble_orchestrator.py", *COMMAND, "--workspace", f"workspaces/{workspace.name}"])
    output = done.stdout.replace("\r\n", "\n").replace(str(workspace), f"workspaces/{workspace.name}").rstrip("\n")
    lines = [wrapped for text in output.split("\n") for wrapped in wrap(text)][:LINES]
    text = (
        html.escape("\n".join(lines)).replace("\x1b[1m", "<b>").replace("\x1b[2m", "<span>").replace("\x1b[0m", "</b>")
    )
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    return TERMINAL.format(font=font.as_uri(), text=f"<i>$</i> <b>{html.escape(shown)}</b>\n{text}")


def wrap(line: str) -> list[str]:
    """The line as a terminal of `COLUMNS` columns breaks it."""
    if "\x1b" in line:  # a row of the table, which fits
        return [line]
    return [line[start : start + COLUMNS] for start in range(0, max(1, len(line)), COLUMNS)]


def save(name: str, picture: bytes) -> None:
    """Write a PNG with a palette to `PICTURES` and say how large it is."""
    from PIL import Image

    path = PICTURES / f"{name}.png"
    image = Image.open(io.BytesIO(picture), formats=["PNG"]).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(PROJECT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
