"""Preprocessing of the test networks."""

from __future__ import annotations

from utils.networks.preprocessing import Preprocessing

BASE_32 = Preprocessing.of_base_pipeline(32)
"""The base pipeline's evaluation transform for networks of 32 px."""
