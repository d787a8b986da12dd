"""Declared forms of JSON records, so that a damaged record is reported when it is read, not when it is used.

A form is a type, a tuple of types, `Each(form)` for the values of an object or a list (`count` of them), or a mapping
{key: form}. A key that ends with `?` may be missing or null. Further keys are allowed. `float` also accepts integers;
numbers do not accept true or false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@dataclass(frozen=True)
class Each:
    """Values of one form, in an object (default) or a list."""

    form: Form
    container: type = dict
    or_null: bool = False
    count: int | None = None


Form: TypeAlias = "type | tuple[type, ...] | Each | Mapping[str, Form]"


def problem_of(value: Any, form: Form, where: str = "") -> str | None:
    """The difference from the form, such as `'units' / 'a train' is a list; expected an object`; None without any."""
    if isinstance(form, Each):
        if not isinstance(value, form.container):
            return _differs(value, form.container, where)
        container: Any = value
        if form.count is not None and len(container) != form.count:
            return f"{where or 'it'} has {len(container)} values; expected {form.count}"
        items = container.items() if form.container is dict else enumerate(container)
        return _first(
            problem_of(item, form.form, _below(where, key))
            for key, item in items
            if item is not None or not form.or_null
        )
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            return _differs(value, dict, where)
        return _first(_problem_of_key(value, key, inner, where) for key, inner in form.items())
    types = form if isinstance(form, tuple) else (form,)
    fits = any(
        isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        for kind in types
    )
    return None if fits else _differs(value, types, where)


def _problem_of_key(record: dict[str, Any], key: str, form: Form, where: str) -> str | None:
    name = key.removesuffix("?")
    if record.get(name) is None and key != name:
        return None
    if name not in record:
        return f"{where or 'it'} has no {name!r}"
    return problem_of(record[name], form, _below(where, name))


def _below(where: str, key: object) -> str:
    text = repr(key) if len(str(key)) <= 60 else f"{str(key)[:57]!r}..."
    return f"{where} / {text}" if where else text


def _differs(value: Any, expected: type | tuple[type, ...], where: str) -> str:
    types = expected if isinstance(expected, tuple) else (expected,)
    actual = next((name for kind, name in NAMES.items() if type(value) is kind), type(value).__name__)
    return f"{where or 'it'} is {actual}; expected {' or '.join(NAMES[kind] for kind in types)}"


def _first(problems: Any) -> str | None:
    return next((problem for problem in problems if problem is not None), None)
