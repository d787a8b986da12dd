"""Mutants of a module, by small changes of its syntax: operators, comparisons, constants, conditions, statements.

Each is a replacement of a few characters of the source, so that the rest of the file stays as it is. Left out are
texts, annotations, what an error says, and imports: no test should depend on them. So are assertions, `assert` and the
`strict=` of a `zip`, which only guard against mistakes of other code: with lists of equal length they change nothing.
Nothing is returned in place of `False` or None, which no condition tells apart and the type checker refuses.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterator
from typing import NamedTuple

COMPARISONS = {
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    **{"in": "not in", "not in": "in", "is": "is not", "is not": "is"},
}
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "*", "**": "*", "&": "|", "|": "&"}
TOKEN = re.compile(r"not\s+in|is\s+not|in|is|and|or|[<>=!]=|\*\*|//|[<>+\-*/%&|@^]")
REMOVED = (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete)
"""Kinds of statements that are replaced by `pass`."""


class Mutant(NamedTuple):
    """One change of a module."""

    module: str
    """Path of the file, relative to the project"""
    line: int
    start: int
    """Bytes `start` to `end` of the file are replaced"""
    end: int
    new: str
    old: str
    kind: str
    whole_line: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names it while other lines of the file change."""
        return self.module, self.whole_line, " ".join(self.old.split()), " ".join(self.new.split())

    @property
    def text(self) -> str:
        """The change in one line."""
        old, new = (" ".join(part.split())[:60] for part in (self.old, self.new))
        return f"{self.module}:{self.line} {self.kind}: {old} -> {new}"

    def applied(self, source: bytes) -> bytes:
        """The source with the change."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def mutants(module: str, source: bytes, keys: Container[tuple[str, str, str, str]] | None = None) -> list[Mutant]:
    """All mutants of a file that compile and differ from it; of these `keys` alone, if given."""
    tree = ast.parse(source)
    before = ast.dump(tree)
    found = []
    for mutant in dict.fromkeys(_Finder(module, source).all_of(tree)):
        if keys is not None and mutant.key not in keys:
            continue
        try:
            after = ast.dump(ast.parse(mutant.applied(source)))
        except SyntaxError:
            continue
        if after != before:
            found.append(mutant)
    return found


class _Finder:
    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source = module, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def all_of(self, node: ast.AST) -> Iterator[Mutant]:
        """Of a node and what it consists of, less what no test should depend on."""
        yield from self.of(node)
        for child in self.children(node):
            yield from self.all_of(child)

    def children(self, node: ast.AST) -> Iterator[ast.AST]:
        for name, value in ast.iter_fields(node):
            is_left_out = name in ("annotation", "returns", "decorator_list", "type_params") or (
                isinstance(node, ast.Raise) and name in ("exc", "cause")
            )
            parts = value if isinstance(value, list) else [value]
            for child in parts if not is_left_out else ():
                is_tested = isinstance(child, ast.AST) and not isinstance(
                    child, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)
                )
                if is_tested and not _is_strictness(node, child):
                    yield child

    def of(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare):
            left = node.left
            for right in node.comparators:
                yield from self.operator(left, right, COMPARISONS, "comparison")
                left = right
        elif isinstance(node, ast.BinOp):
            yield from self.operator(node.left, node.right, OPERATORS, "operator")
        elif isinstance(node, ast.BoolOp):
            yield from self.operator(node.values[0], node.values[1], {"and": "or", "or": "and"}, "operator")
        elif isinstance(node, ast.Constant):
            yield from self.constant(node)
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not _is_type_checking(node.test):
            yield self.replaced(node.test, f"(not ({self.text_of(node.test)}))", "condition")
        elif isinstance(node, ast.comprehension):
            for condition in node.ifs:
                yield self.replaced(condition, f"(not ({self.text_of(condition)}))", "condition")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
            yield self.replaced(node, self.text_of(node.operand), "operator")
        if isinstance(node, REMOVED) and not _is_text(node) and not _is_log(node):
            yield self.replaced(node, "pass", "statement")
        elif isinstance(node, ast.Return) and node.value is not None and not _is_none_or_false(node.value):
            yield self.replaced(node.value, "None", "returned")

    def constant(self, node: ast.Constant) -> Iterator[Mutant]:
        if isinstance(node.value, bool):
            yield self.replaced(node, str(not node.value), "constant")
        elif isinstance(node.value, int):
            yield self.replaced(node, str(node.value + 1), "constant")
        elif isinstance(node.value, float):
            yield self.replaced(node, repr(2 * node.value or 1.0), "constant")

    def operator(self, left: ast.expr, right: ast.expr, table: dict[str, str], kind: str) -> Iterator[Mutant]:
        start, end = self.place(left)[1], self.place(right)[0]
        token = TOKEN.search(self.source[start:end].decode())
        if token is None:
            return
        old = " ".join(token.group().split())
        if old in table:
            whole = self.source[self.place(left)[0] : self.place(right)[1]].decode()
            at = start + len(self.source[start:end].decode()[: token.start()].encode())
            until = at + len(token.group().encode())
            changed = self.source[self.place(left)[0] : at].decode() + table[old]
            changed += self.source[until : self.place(right)[1]].decode()
            yield Mutant(
                self.module,
                left.lineno,
                self.place(left)[0],
                self.place(right)[1],
                changed,
                whole,
                kind,
                self.line(left),
            )

    def place(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """First byte and the byte after the last."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text_of(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.place(node)
        return self.source[start:end].decode()

    def line(self, node: ast.expr | ast.stmt) -> str:
        """The line of the source that it begins on."""
        return self.source[self.starts[node.lineno - 1] : self.starts[node.lineno]].decode().strip()

    def replaced(self, node: ast.expr | ast.stmt, new: str, kind: str) -> Mutant:
        start, end = self.place(node)
        return Mutant(self.module, node.lineno, start, end, new, self.text_of(node), kind, self.line(node))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_log(node: ast.AST) -> bool:
    """Whether a statement is a line of the log."""
    call = node.value if isinstance(node, ast.Expr) else None
    function = call.func if isinstance(call, ast.Call) else None
    return (
        isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "logger"
    )


def _is_strictness(node: ast.AST, child: ast.AST) -> bool:
    """Whether the child is the argument `strict` of a call of `zip`."""
    is_zip = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip"
    return is_zip and isinstance(child, ast.keyword) and child.arg == "strict"


def _is_type_checking(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "TYPE_CHECKING"


def _is_none_or_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or node.value is False)
