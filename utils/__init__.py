"""This project's package, and BASE-BACK's `utils` as well: see `utils.base_back`.

Importing it, or any module of ours below it, reads no BASE-BACK file and imports no torch.
"""

from __future__ import annotations

from utils import base_back

__getattr__ = base_back.exported

base_back.install()
