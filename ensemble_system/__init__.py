"""Read from Python what the ensemble system's commands have written into a workspace.

import ensemble_system as es

workspace = es.open("work")
workspace.ranking().recommended
workspace.predictions("weighted_ensemble", "test").probabilities
workspace.predict(["photos/0001.jpg"])
"""

from __future__ import annotations

from ensemble_system.reader import CommandError, ImagePrediction, Predictions, Ranking, Workspace, open

__all__ = ["CommandError", "ImagePrediction", "Predictions", "Ranking", "Workspace", "open"]
__version__ = "0.1.0"
