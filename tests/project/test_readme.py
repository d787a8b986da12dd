"""What README and the pages of docs/ show can be typed: verbs of the Makefile, commands and options of the programs.

Every link leads to a file, and every anchor to a heading.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from conftest import PROJECT, run_python

import ensemble_orchestrator
from utils.evaluation import leaderboard

README = (PROJECT / "README.md").read_text(encoding="utf-8")
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"_build", "generated"} & set(page.parts)]
OWN_PAGES = [
    *PAGES,
    *(PROJECT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "tests/README.md")),
]
BLOCKS = [
    block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]
LINES = [re.split(" #| > ", line)[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
VERBS = set(re.findall(r"^([a-z-]+):.*## ", (PROJECT / "Makefile").read_text(), re.MULTILINE))


def commands(start: str) -> list[str]:
    return sorted({line for line in LINES if line.startswith(start)})


def test_the_two_verbs_stand_first():
    assert commands("make")[:1]
    assert {"make demo", "make test"} <= set(LINES)
    assert README.index("make demo") < README.index("ensemble_orchestrator.py")


@pytest.mark.parametrize("line", commands("make "))
def test_every_verb_exists(line):
    assert shlex.split(line)[1] in VERBS


@pytest.mark.parametrize("line", commands("python ensemble_orchestrator.py"))
def test_every_orchestrator_line_is_understood(line):
    arguments = shlex.split(line)[2:]
    parsed = ensemble_orchestrator.build_parser().parse_args(arguments)
    assert parsed.command in ensemble_orchestrator.COMMANDS
    named = [PROJECT / value for value in arguments if value.startswith("configs/")]
    assert all(path.is_file() for path in named)


@pytest.mark.parametrize("line", commands("ensemble-system "))
def test_every_line_of_the_installed_command_is_understood(line):
    parsed = ensemble_orchestrator.build_parser().parse_args(shlex.split(line)[1:])
    assert parsed.command in ensemble_orchestrator.COMMANDS


@pytest.mark.parametrize("line", commands("python BASE-BACK/src/main.py"))
def test_every_base_pipeline_line_is_understood(line):
    code = "import sys; sys.path.insert(0, 'BASE-BACK/src'); import main; main.build_parser().parse_args(sys.argv[1:])"
    done = run_python("-c", code, *shlex.split(line)[2:])
    assert done.returncode == 0, done.stderr


def test_every_command_is_shown():
    shown = {line.split()[2] for line in commands("python ensemble_orchestrator.py")}
    assert shown == set(ensemble_orchestrator.COMMANDS)


def printed_lines(page: Path) -> list[str]:
    """Lines of the blocks that show output, without the dots that stand for what is left out."""
    lines, language = [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language == "":
            lines.append(re.sub(r",? ?\.\.\.$", "", line).strip())
    return [line for line in lines if line]


def test_what_readme_shows_of_a_run_is_what_the_pages_show_of_it():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES[1:])
    shown = printed_lines(PROJECT / "README.md")
    assert len(shown) > 8
    assert [line for line in shown if line not in pages] == []


def test_a_ranking_that_a_page_shows_has_the_columns_that_evaluate_prints():
    headings = {heading.replace(" [95%]", "") for heading in leaderboard.HEADINGS.values()}
    own = {"rank", "name", "kind", "p", "on test", "change", "OOD AUROC"}
    tables = [line for page in PAGES for line in printed_lines(page) if line.startswith("rank  name")]
    assert len(tables) >= 3
    for line in tables:
        cells = {cell.removesuffix(" [95%]") for cell in re.split(r" {2,}", line)}
        assert cells <= headings | own, cells - headings - own


def test_readme_is_short():
    assert README.count("\n") <= 150


def test_every_page_is_in_the_contents_of_the_site():
    index = (PROJECT / "docs" / "index.md").read_text(encoding="utf-8")
    named = {line for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL) for line in block.split()}
    pages = {page.relative_to(PROJECT / "docs").with_suffix("").as_posix() for page in PAGES[1:]}
    assert pages - {"index"} <= named


def anchors(page: Path) -> set[str]:
    """The headings of a page as hosts of repositories and Sphinx make links of them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", OWN_PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!http|generated/)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if "generated" in path.parts:
            continue
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def site_module(name: str):
    spec = spec_from_file_location(name, PROJECT / "docs" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_has_a_page_for_each_command_with_its_options(tmp_path):
    pages = site_module("reference_pages")
    pages.write(tmp_path / "generated")
    for name, command in ensemble_orchestrator.COMMANDS.items():
        page = (tmp_path / "generated" / "commands" / f"{name}.md").read_text(encoding="utf-8")
        shown = {option for option, how in command.arguments.items() if how.get("help") != argparse.SUPPRESS}
        assert shown | ensemble_orchestrator.COMMON_OPTIONS.keys() == set(
            re.findall(r"^\| `([\w-]+)", page, re.MULTILINE)
        )
    assert not re.search(r"%\(\w+\)", "".join(path.read_text() for path in (tmp_path / "generated/commands").iterdir()))


def test_links_to_pages_outside_the_folder_lead_to_their_copies_on_the_site():
    led = site_module("reference_pages").with_site_links
    assert led("[how](../../CONTRIBUTING.md)", "guides/export") == "[how](../generated/project/CONTRIBUTING.md)"
    assert led("[x](../configs/votes.yaml)", "scale") == "x (`configs/votes.yaml`)"
    assert led("[x](docs/contract.md#options)", "generated/project/SECURITY") == "[x](../../contract.md#options)"
    assert led("[x](contract.md) ![y](../z.png)", "scale") == "[x](contract.md) ![y](../z.png)"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    shutil.copytree(
        PROJECT, tmp_path / "project", ignore=shutil.ignore_patterns(".*", "tests", "benchmarks", "workspaces")
    )
    command = ("-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", "site")
    done = run_python(*command, cwd=tmp_path / "project")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "project" / "site" / "generated" / "commands" / "predict.html").is_file()


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(built, tmp_path):
    notebook = json.loads((PROJECT / "docs/notebooks/first_look.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n\n".join(cells), encoding="utf-8")
    environment = {"ENSEMBLE_WORKSPACE": str(built), "PYTHONPATH": str(PROJECT), "MPLBACKEND": "Agg"}
    done = run_python(str(tmp_path / "cells.py"), environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recommended: " in done.stdout
    assert all(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"), "outputs are stored"
