"""Mutants that no test can catch, as nobody can see them; each with the reason."""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str, str], str] = {}
"""{(module, line of the source, old, new): why it changes nothing}"""
