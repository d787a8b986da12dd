"""How often what the product claims is wrong: nominal beside actual error rates over simulated workspaces.

    python benchmarks/claims.py                       all rows, 2,000 simulations each
    python benchmarks/claims.py --quick               50 simulations each, not the figures to report
    python benchmarks/claims.py --only selective      some checks by name
    python benchmarks/claims.py --continue            all but those whose outcomes are kept, with the commits of these

Every claim is made by the product's own functions on workspaces whose truth is known (`simulated_workspaces`,
`claim_checks`, `claim_checks_uncertainty`). Each pair of check and workspace has its own seed, so that a part gives the
figures of the whole. The table's columns are workspaces, its cells per cent of the simulations in which an answer was
given; biases are in standard deviations of the score. Fits of combiners are simulated an eighth as often. One core; the
last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import claim_checks
import claim_checks_uncertainty
import numpy as np
from claim_checks import Check, Claim
from simulated_workspaces import WORKSPACES, SimulatedWorkspace

from reporting import report, row

PROJECT = Path(__file__).resolve().parents[1]
KEPT = PROJECT / "benchmarks" / "zoo" / "claims"
CHECKS: Mapping[str, Check] = {**claim_checks.CHECKS, **claim_checks_uncertainty.CHECKS}
SIMULATIONS, QUICK = 2000, 50
COVERAGE, ERRORS, BIAS = (93.0, 98.0), 6.0, 0.25
ABSTENTIONS, LARGE = 10.0, 500
"""Per cent of no answers that a claim may have in workspaces of more rows than this."""
PRECISE = 1000
"""Answers below which a figure may be two standard errors outside of its goal."""


@dataclass(frozen=True)
class Figure:
    """How a claim does in a workspace."""

    actual: float | None
    """Per cent, or standard deviations for a bias; None where no simulation gave an answer"""
    abstained: float
    """Per cent of the simulations without an answer"""
    error: float
    """Standard error of `actual`"""
    answers: int
    """Simulations with an answer"""


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print the table and the report; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="claims.py", description="Error rates of what the product claims.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} simulations each")
    parser.add_argument("--simulations", metavar="N", type=int, help=f"simulations each (default: {SIMULATIONS})")
    parser.add_argument("--only", metavar="CHECK", action="append", choices=sorted(CHECKS), help="this check alone")
    parser.add_argument("--workspaces", metavar="LETTERS", default="".join(WORKSPACES), help="these workspaces alone")
    parser.add_argument("--continue", dest="kept", action="store_true", help="do not repeat those that are kept")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(PROJECT))
    simulations = options.simulations or (QUICK if options.quick else SIMULATIONS)
    figures: dict[str, dict[str, Figure]] = {}
    commits: set[str] = set()
    for name in options.only or CHECKS:
        check = CHECKS[name]
        for letter in check.workspaces:
            if letter not in options.workspaces:
                continue
            start, count = time.monotonic(), max(2, simulations // check.divisor)
            kept = read_kept(name, letter, count) if options.kept else None
            if kept is None:
                kept = commit(), simulate(check, WORKSPACES[letter], f"{name}/{letter}", count)
                keep(name, letter, *kept)
            commits.add(kept[0])
            outcomes = kept[1]
            for key, values in outcomes.items():
                figures.setdefault(key, {})[letter] = figure(check.claims[key], values)
            print(f"{name} {letter}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    claims = {key: claim for check in CHECKS.values() for key, claim in check.claims.items() if key in figures}
    print("\n".join(table(claims, figures)))
    report(
        "claims",
        rows(claims, figures),
        quick=options.quick,
        packages=("numpy", "scipy"),
        simulations=simulations,
        commits=sorted(commits),
        workspaces={letter: workspace.title for letter, workspace in WORKSPACES.items()},
    )
    return 0


def simulate(check: Check, workspace: SimulatedWorkspace, seed: str, simulations: int) -> dict[str, np.ndarray]:
    """Outcomes (S,) of each claim, NaN where no answer was given; `seed` is any text."""
    random = np.random.default_rng(zlib.crc32(seed.encode()))
    once = check.prepare(workspace, random)
    outcomes: dict[str, np.ndarray] = {}
    for number in range(simulations):
        for key, value in once(random).items():
            values = outcomes.setdefault(key, np.full(simulations, np.nan))
            values[number] = np.nan if value is None else value
    return outcomes


def figure(claim: Claim, outcomes: np.ndarray) -> Figure:
    """The figure of outcomes (S,)."""
    answers = outcomes[~np.isnan(outcomes)]
    abstained = 100 * (1 - len(answers) / len(outcomes))
    if not len(answers):
        return Figure(None, abstained, 0.0, 0)
    spread = float(answers.std(ddof=1)) if len(answers) > 1 else 0.0
    if claim.kind.endswith("bias"):
        return Figure(float(answers.mean()) / spread if spread else 0.0, abstained, len(answers) ** -0.5, len(answers))
    return Figure(100 * float(answers.mean()), abstained, 100 * spread / len(answers) ** 0.5, len(answers))


def holds(claim: Claim, found: Figure, workspace: SimulatedWorkspace) -> bool | None:
    """Whether a figure is within its goal; None for a claim without one and where no answer was given."""
    if claim.kind in ("none", "own_bias"):
        return None
    if workspace.rows > LARGE and found.abstained >= ABSTENTIONS:
        return False
    if found.actual is None:
        return None
    low, high = limits(claim)
    is_close = claim.kind == "at_least"  # to its nominal figure, by the method's own theory
    slack = 2 * found.error if is_close or found.answers < PRECISE else 0.0
    return low - slack <= found.actual <= high + slack


def limits(claim: Claim) -> tuple[float, float]:
    """Lowest and highest figure within the goal."""
    nominal = claim.nominal or 0.0
    ranges = {
        "interval": COVERAGE,
        "error": (0.0, ERRORS),
        "at_least": (nominal, 100.0),
        "at_most": (0.0, nominal + 1),
        "bias": (-BIAS, BIAS),
    }
    return ranges[claim.kind]


def goal(claim: Claim) -> tuple[str, str]:
    """Nominal figure and goal, as text."""
    nominal = f"{claim.nominal:g}%" if claim.nominal is not None else ""
    return {
        "interval": ("95%", f"{COVERAGE[0]:g} to {COVERAGE[1]:g}"),
        "error": (nominal or "5%", f"at most {ERRORS:g}"),
        "at_least": (nominal, f"at least {claim.nominal}"),
        "at_most": (nominal, f"at most {(claim.nominal or 0) + 1:g}"),
        "bias": ("0", f"-{BIAS} to {BIAS}"),
        "own_bias": ("0", ""),
        "none": (nominal, ""),
    }[claim.kind]


def table(claims: Mapping[str, Claim], figures: Mapping[str, Mapping[str, Figure]]) -> list[str]:
    """Markdown: one line per claim, one column per workspace; misses are marked, abstentions in brackets."""
    letters = [letter for letter in WORKSPACES if any(letter in found for found in figures.values())]
    lines = [["claim", "nominal", "goal", *letters]]
    for key, claim in claims.items():
        cells = []
        for letter in letters:
            found = figures[key].get(letter)
            cells.append("" if found is None else cell(claim, found, WORKSPACES[letter]))
        lines.append([claim.title, *goal(claim), *cells])
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "---|" * len(lines[0]))
    return [*text, "", *(f"{letter}: {WORKSPACES[letter].title}" for letter in letters), ""]


def cell(claim: Claim, found: Figure, workspace: SimulatedWorkspace) -> str:
    """A figure, bold where its goal is missed, with the per cent of abstentions."""
    text = (
        "-" if found.actual is None else f"{found.actual:.2f}" if claim.kind.endswith("bias") else f"{found.actual:.1f}"
    )
    text = f"**{text}**" if holds(claim, found, workspace) is False else text
    return f"{text} ({found.abstained:.0f})" if found.abstained >= 0.5 else text


def rows(claims: Mapping[str, Claim], figures: Mapping[str, Mapping[str, Figure]]) -> list[dict[str, Any]]:
    """Rows of the report: one per claim and workspace."""
    entries = []
    for key, claim in claims.items():
        nominal, wanted = goal(claim)
        for letter, found in figures[key].items():
            peer = "" if not nominal else f"nominal {nominal}"
            peer += f"{', ' if peer else ''}no answer in {found.abstained:.1f}%" if found.abstained else ""
            unit = "standard deviations" if claim.kind.endswith("bias") else "%"
            verdict = holds(claim, found, WORKSPACES[letter])
            entries.append(row(f"{claim.title} [{letter}]", found.actual, unit, wanted or None, verdict, peer or None))
    return entries


# kept outcomes -------------------------------------------------------------------------------------------------------
def keep(name: str, letter: str, source: str, outcomes: Mapping[str, np.ndarray]) -> None:
    """Keep the outcomes of a check in a workspace, with the commit that they are of."""
    from utils.core.artifacts import write_json

    KEPT.mkdir(parents=True, exist_ok=True)
    values = {key: [None if np.isnan(value) else value for value in each] for key, each in outcomes.items()}
    write_json(KEPT / f"{name}-{letter}.json", {"commit": source, "outcomes": values})


def read_kept(name: str, letter: str, simulations: int) -> tuple[str, dict[str, np.ndarray]] | None:
    """The commit and the outcomes that are kept of so many simulations; None where there are none."""
    path = KEPT / f"{name}-{letter}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    outcomes = {key: np.array(values, dtype=float) for key, values in content["outcomes"].items()}
    return (content["commit"], outcomes) if all(len(values) == simulations for values in outcomes.values()) else None


def commit() -> str:
    """The short name of what is checked out, by the program that keeps all reports."""
    return str(import_module("all").commit())


if __name__ == "__main__":
    sys.exit(main())
