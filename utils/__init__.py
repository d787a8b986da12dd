"""This project's package, which also gives access to BASE-BACK's `utils`: see `utils.base_back`.

Importing it, or any module of this project in it, reads no BASE-BACK file and imports no torch.
"""

from __future__ import annotations

from utils import base_back

__getattr__ = base_back.exported

base_back.install()
