"""Runs `export` and finds the folder that it wrote."""

from __future__ import annotations

from pathlib import Path

from finished_workspace import CONFIG, at

from utils.core.config_file import load_config
from utils.exporting import (
    export,
)

NAME = "soft_voting_ensemble"


def run(base: Path, name: str | None = NAME, *formats: str, **options):
    config = load_config(CONFIG, overrides=["exports.enable=true"])
    return export.export(config, at(base), model_name=name, formats=formats or ["onnx"], **options)


def folder_of(base: Path, name: str = NAME) -> Path:
    return base / "deployment_models" / name
