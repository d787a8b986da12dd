"""Imports go down only: the floors in pyproject.toml hold for every module, lazy imports included."""

from __future__ import annotations

import ast
import tomllib

import pytest
from conftest import PROJECT

FLOORS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["storeys"]["floors"]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = sorted([PROJECT / "ensemble_orchestrator.py", *(PROJECT / "utils").glob("*.py")])
BASE_UTILS = {path.stem for path in (PROJECT / "BASE-BACK" / "src" / "utils").glob("*.py")} - {"__init__"}


def imported_rooms(tree: ast.AST, rooms: set[str]):
    """Rooms that a module imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.module == "utils":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("utils."):
                yield node.module.split(".")[1]
            elif node.level:
                yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("utils."))


@pytest.mark.parametrize("path", [path for path in ROOMS if path.stem != "__init__"], ids=lambda path: path.stem)
def test_a_room_imports_only_from_lower_floors(path):
    assert path.stem in FLOOR_OF, f"{path.stem} stands on no floor; add it to [tool.storeys] in pyproject.toml"
    targets = set(imported_rooms(ast.parse(path.read_text()), set(FLOOR_OF))) - {"errors"}
    assert targets <= FLOOR_OF.keys(), f"{path.stem} imports {sorted(targets - FLOOR_OF.keys())}, which is no room"
    wrong = {target for target in targets if FLOOR_OF[target] >= FLOOR_OF[path.stem]}
    assert not wrong, f"{path.stem} (floor {FLOOR_OF[path.stem]}) imports {sorted(wrong)}, not below it"


def test_every_room_on_a_floor_exists():
    assert FLOOR_OF.keys() == {path.stem for path in ROOMS} - {"__init__"}


def test_no_room_has_the_name_of_a_module_or_export_of_the_base_pipelines_utils():
    exports = {"logger", "smoke_checker", "DEVICE", "get_device", "set_seed", "DedupLogger"}
    assert not FLOOR_OF.keys() & (BASE_UTILS | {"datasets", "checkpoint_manager", "visualization"} | exports)


def test_the_base_pipeline_never_imports_the_orchestrator():
    for path in (PROJECT / "BASE-BACK").rglob("*.py"):
        found = set(imported_rooms(ast.parse(path.read_text()), set(FLOOR_OF)))
        assert not found & FLOOR_OF.keys(), f"{path}: imports {sorted(found & FLOOR_OF.keys())}"


def test_only_base_back_and_streaming_touch_the_base_pipeline():
    for path in (PROJECT / "utils").glob("*.py"):
        tops = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not tops & {"config", "models", "training", "export"}, f"{path.stem} imports BASE-BACK directly"
