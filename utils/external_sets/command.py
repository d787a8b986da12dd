"""The command `evaluate`: on a split of the workspace or, with `--data`, on an external set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.core.config import Config
from utils.core.errors import ConfigError
from utils.core.results import Result
from utils.core.workspace import Workspace


def evaluate(
    config: Config,
    workspace: Workspace,
    *,
    data: str | None = None,
    class_map: str | None = None,
    name: str | None = None,
    missing: str | None = None,
    from_export: str | None = None,
    mlflow: str | None = None,
    tensorboard: str | None = None,
    force: bool = False,
    **options: Any,
) -> Result:
    """Evaluate on the external set `data`, or on a split; further `options` are those of `evaluation.evaluate`.

    Runs are also written to the MLflow server or folder `mlflow` and to the folder `tensorboard`.

    Raises ConfigError for options that need `--data` without it, and for `metrics`, `plots`, `maps` and trackers with
    it.
    """
    from utils.evaluation import evaluate as split_evaluation

    if data is None:
        external_options = {
            "--class-map": class_map,
            "--name": name,
            "--missing": missing,
            "--from-export": from_export,
        }
        if unusable := [option for option, value in external_options.items() if value is not None]:
            raise ConfigError(f"evaluate {' '.join(unusable)}: expected together with --data DIR or --data FILE.csv")
        return _evaluate_split(config, workspace, mlflow, tensorboard, {**options, "force": force})
    if mlflow is not None or tensorboard is not None:
        raise ConfigError("evaluate --mlflow and --tensorboard: hold the scores of a split; expected without --data")
    if options.get("metrics") is not None:
        raise ConfigError("evaluate --metrics: chooses the columns of a split's ranking; expected without --data")
    if options.get("plots") is not None:
        raise ConfigError("evaluate --plots: chooses the plots of a split's scores; expected without --data")
    if options.get("maps"):
        raise ConfigError("evaluate --maps: adds pictures of the split's images to the report; expected without --data")
    from utils.evaluation.evaluation_inputs import EvaluationSettings
    from utils.external_sets import class_matching, external_inputs
    from utils.external_sets.evaluate_external import ExternalRequest, evaluate_external
    from utils.external_sets.labelled_images import set_name

    allow_contaminated = bool(options.get("allow_contaminated"))
    if from_export is not None and options.get("model_name") is not None:
        raise ConfigError("evaluate --from-export: not together with --model-name; the file is the model")
    external_inputs.require_options(options.get("split", "test"), allow_contaminated=allow_contaminated)
    uncertainty = split_evaluation.uncertainty_options(
        **{key: options[key] for key in ("alpha", "target_risk", "wanted_error", "class_conditional") if key in options}
    )
    settings = EvaluationSettings(
        "test",
        options.get("model_name"),
        False,
        config.runs.score_ensemble.optimization_metric,
        config.seed,
        uncertainty,
    )
    source = Path(data).expanduser()
    request = ExternalRequest(
        source,
        None if class_map is None else Path(class_map).expanduser(),
        set_name(source, name),
        missing or class_matching.REFUSE,
        force,
        None if from_export is None else Path(from_export).expanduser(),
    )
    return evaluate_external(config, workspace, request, settings)


def _evaluate_split(
    config: Config, workspace: Workspace, mlflow: str | None, tensorboard: str | None, options: dict[str, Any]
) -> Result:
    from utils.evaluation import evaluate as split_evaluation

    if mlflow is None and tensorboard is None:
        return split_evaluation.evaluate(config, workspace, **options)
    from utils.evaluation.trackers import tracking

    opened = tracking.open_trackers(mlflow, tensorboard)
    result = split_evaluation.evaluate(config, workspace, **options)
    alone = None if options.get("model_name") is None else result.document["name"]
    return tracking.track(opened, workspace, options.get("split", "test"), result, alone)
