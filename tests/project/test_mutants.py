"""Which changes of a source the generator of tests/mutants makes, and which it leaves out."""

from __future__ import annotations

import sys

import pytest
from conftest import PROJECT

sys.path.append(str(PROJECT / "tests" / "mutants"))
from generate import mutants
from modules import MODULES
from survivors import EQUIVALENT


def changes(source):
    return [(mutant.kind, mutant.old, mutant.new) for mutant in mutants("m.py", source.encode())]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = b < c", [("comparison", "b < c", "b <= c")]),
        ("a = b + c", [("operator", "b + c", "b - c")]),
        ("a = b and c", [("operator", "b and c", "b or c")]),
        ("a = not b", [("operator", "not b", "b")]),
        ("a = 1", [("constant", "1", "2")]),
        ("a = 0.5", [("constant", "0.5", "1.0")]),
        ("a = True", [("constant", "True", "False")]),
        ("a = b if c else d", [("condition", "c", "(not (c))")]),
        ("def f():\n    return a", [("returned", "a", "None")]),
        ("def f():\n    return False", [("constant", "False", "True")]),
        ("def f():\n    return None", []),
        ("def f():\n    g()", [("statement", "g()", "pass")]),
        ("a += b", [("statement", "a += b", "pass")]),
        ("a = zip(b, c, strict=True)", []),
        ("a = zip(b[1], c, strict=True)", [("constant", "1", "2")]),
        ("a = f(b, strict=True)", [("constant", "True", "False")]),
        ("assert a < b", []),
        ("import a\nfrom b import c", []),
        ("def f(a: Literal[1]) -> None:\n    'Text.'", []),
        ("logger.info(a)", []),
        ("raise E(f'{a + 1}')", [("statement", "raise E(f'{a + 1}')", "pass")]),
    ],
)
def test_a_source_has_these_mutants(source, expected):
    assert changes(source) == expected


def test_a_mutant_changes_its_characters_alone():
    source = "é = 'ä'; b = c < d  # text\n".encode()
    (mutant,) = mutants("m.py", source)
    assert mutant.applied(source).decode() == "é = 'ä'; b = c <= d  # text\n"
    assert mutant.key == ("m.py", "é = 'ä'; b = c < d  # text", "c < d", "c <= d")


def test_listed_tests_exist_and_listed_survivors_are_mutants():
    for tests in MODULES.values():
        assert all((PROJECT / "tests" / test).is_file() for test in tests)
    modules = sorted({module for module, *_ in EQUIVALENT})
    sources = {module: (PROJECT / module).read_bytes() for module in modules}
    keys = {mutant.key for module, source in sources.items() for mutant in mutants(module, source, EQUIVALENT)}
    assert set(EQUIVALENT) <= keys
    assert all(EQUIVALENT.values())
