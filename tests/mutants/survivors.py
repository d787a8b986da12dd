"""Mutants that no test can catch, as nobody can see them; each with the reason."""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    (
        "utils/building/selection_rule.py",
        "first_new = max(self.group_of.values()) + 1",
        "1",
        "2",
    ): "only which rows share an index matters, and no listed group has either index",
    (
        "utils/core/array_archives.py",
        "if total > memory // 2:",
        "memory // 2",
        "memory / 2",
    ): "the bytes of a machine's memory are an even number",
    ("utils/core/artifacts.py", "BLOCK = 1 << 20", "1", "2"): "the same zeros are written in pieces of another size",
    ("utils/core/artifacts.py", "BLOCK = 1 << 20", "20", "21"): "the same zeros are written in pieces of another size",
    (
        "utils/core/artifacts.py",
        "umask = os.umask(0)",
        "0",
        "1",
    ): "the mask is set back by the next line, before any file is created",
    (
        "utils/core/locks.py",
        'resolved, kind, longest = os.path.realpath(path.parent), "", -1',
        "-1",
        "1",
    ): "no mount point is shorter than one character",
    (
        "utils/core/locks.py",
        'resolved, kind, longest = os.path.realpath(path.parent), "", -1',
        "1",
        "2",
    ): "no mount point is shorter than one character",
    (
        "utils/core/strict_json.py",
        "content = file.read(MOST_BYTES + 1)",
        "1",
        "2",
    ): "one byte more than the limit shows that a file is too large, and two do",
    (
        "utils/discovery/imported_members.py",
        "limit = physical_memory() // 2",
        "physical_memory() // 2",
        "physical_memory() / 2",
    ): "the bytes of a machine's memory are an even number",
    (
        "utils/numeric/nested_cv.py",
        "learner: GridLearner, logits: Any, labels: np.ndarray, folds: np.ndarray, *, n_jobs: int = 1",
        "1",
        "2",
    ): "the number of fits at a time changes no result",
    (
        "utils/numeric/nested_cv.py",
        "final = Selection.without(nobody, inner_folds(labels, folds, ~nobody), paths, are_nested=False)",
        "False",
        "True",
    ): "nothing reads the votes that are added",
    (
        "utils/numeric/setting_search.py",
        "n_threads=n_jobs if learner.thread_safe else 1,",
        "learner.thread_safe",
        "(not (learner.thread_safe))",
    ): "the number of fits at a time changes no result",
    (
        "utils/numeric/setting_search.py",
        "n_threads=n_jobs if learner.thread_safe else 1,",
        "1",
        "2",
    ): "the number of fits at a time changes no result",
    (
        "utils/numeric/setting_search.py",
        "break",
        "break",
        "pass",
    ): "a path that no selection reads is followed by no fit",
    (
        "utils/numeric/setting_search.py",
        "values = np.empty((len(self.rows), by_fold[0].shape[1]), dtype=np.float32)",
        "0",
        "1",
    ): "there are at least two inner folds, and every fit predicts all classes",
    (
        "utils/predictions/folds.py",
        "VERSION = 3  # incremented whenever the assignment of the same rows changes",
        "3",
        "4",
    ): "folds of another version are assigned again, with the same result",
    (
        "utils/predictions/training_evidence.py",
        "highest = float(beta.ppf(1 - ALPHA / 2, errors + 1, hits)) if hits else 1.0",
        "1.0",
        "2.0",
    ): "no half of an error rate is above 0.5, so that neither bound is below it",
}
"""{(module, line of the source, old, new): why it changes nothing}"""
