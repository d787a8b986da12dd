"""Modules that decide honesty, alignment, calibration and files, each with the tests that should notice a change.

The tests are those of the module, and where they leave a decision to the whole, the fastest test of that.
"""

from __future__ import annotations

MODULES: dict[str, tuple[str, ...]] = {
    # honesty: which rows a score may be called out of sample on, and what is recommended by it
    "utils/predictions/training_data.py": (
        "predictions/test_training_data.py",
        "discovery/test_training_statements.py",
    ),
    "utils/predictions/training_evidence.py": ("predictions/test_training_evidence.py",),
    "utils/discovery/training_statements.py": ("discovery/test_training_statements.py",),
    "utils/evaluation/evaluated_rows.py": ("evaluation/test_evaluated_rows.py",),
    "utils/numeric/nested_cv.py": (
        "numeric/test_nested_cv.py",
        "numeric/test_setting_paths.py",
    ),
    "utils/numeric/setting_search.py": (
        "numeric/test_setting_paths.py",
        "numeric/test_nested_cv.py",
    ),
    "utils/building/selection_rule.py": (
        "building/test_selection_rule.py",
        "building/test_recommendation.py",
    ),
    "utils/building/recommendation.py": ("building/test_recommendation.py",),
    # alignment: rows by their ids, columns by the names of classes
    "utils/predictions/rows.py": ("predictions/test_rows.py",),
    "utils/predictions/folds.py": ("predictions/test_folds.py",),
    "utils/predictions/out_of_fold.py": ("predictions/test_out_of_fold.py",),
    "utils/discovery/imported_members.py": (
        "discovery/test_imported_members.py",
        "discovery/test_import_predictions.py",
    ),
    "utils/discovery/class_lists.py": ("discovery/test_class_lists.py",),
    # calibration: scores, temperatures, thresholds and their intervals
    "utils/numeric/metrics.py": ("numeric/test_metrics.py",),
    "utils/numeric/temperature.py": ("numeric/test_temperature.py",),
    "utils/numeric/uncertainty.py": ("numeric/test_uncertainty.py",),
    "utils/numeric/selective.py": ("numeric/test_selective.py",),
    "utils/numeric/proportions.py": ("numeric/test_proportions.py",),
    "utils/numeric/means.py": ("numeric/test_means.py",),
    "utils/combiners/shared_fits.py": ("combiners/test_shared_fits.py",),
    "utils/combiners/pooling.py": (
        "combiners/test_pooling.py",
        "combiners/test_weighting.py",
    ),
    # files: what is written, and what of strangers is read
    "utils/core/artifacts.py": (
        "core/test_artifacts.py",
        "core/test_array_archives.py",
    ),
    "utils/core/array_archives.py": (
        "core/test_array_archives.py",
        "core/test_artifacts.py",
        "attacks/test_import_bombs.py",
        "predictions/test_prediction_files.py",
    ),
    "utils/core/locks.py": ("core/test_locks.py",),
    "utils/core/strict_json.py": ("core/test_strict_json.py",),
    "utils/core/record_forms.py": ("core/test_record_forms.py",),
    "utils/core/links.py": ("core/test_unlinked_paths.py",),
    "utils/inference/output_files.py": ("inference/test_output_files.py",),
}
"""{module: tests below `tests`}"""
