"""Tree ensembles as torch modules made of gathers and comparisons: features (B, F) in, probabilities (B, C) out.

All trees are traversed at once, in as many steps as the deepest tree has levels, without data-dependent branches, so
that one module works in PyTorch, TorchScript, ONNX and TFLite. There are two layouts. Up to `PERFECT_DEPTH` levels,
every tree is padded to a perfect binary tree, whose child indices are computed by doubling; deeper trees keep their
nodes and look up the child, a fourth gather per step. Indices are int32: with int64 a large batch takes twice as long.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.core.errors import UserError

if TYPE_CHECKING:
    from sklearn.ensemble import RandomForestClassifier

PERFECT_DEPTH = 8
BLOCK = 256
"""Rows at a time: the intermediate values of 1,300 trees for so few rows fit the caches of a core."""
XGBOOST = ((2, 1), (4, 0))
"""Versions of XGBoost whose JSON is supported: the first, and the first above that is not."""
_OF_ANOTHER_FORM = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Nodes:
    """The K nodes of T trees as one table: the T roots, then level by level, siblings adjacent."""

    child: np.ndarray
    """int32 (K,), index of the left child, which the right child follows; a leaf is its own child"""
    feature: np.ndarray
    """int32 (K,), column of the features"""
    threshold: np.ndarray
    """float32 (K,)"""
    missing_left: np.ndarray
    """bool (K,), whether a missing value goes left"""
    level_sizes: tuple[int, ...]
    """Nodes on each level, T first"""

    @property
    def is_leaf(self) -> np.ndarray:
        """bool (K,)"""
        return self.child == np.arange(len(self.child))

    @property
    def trees(self) -> int:
        """T"""
        return self.level_sizes[0]

    @property
    def depth(self) -> int:
        """Steps from a root to the deepest leaf."""
        return len(self.level_sizes) - 1


# Layouts -------------------------------------------------------------------------------------------------------------
class Descent(nn.Module):
    """Features (B, F) -> the leaf that a row reaches in each of T trees, int32 (B, T), as a row of the table of leaves.

    A value goes right if it is at least the threshold (`inclusive`: XGBoost) or above it (scikit-learn). A missing
    value compares as false and goes left; a node that sends it right reads a copy of the features with infinity instead
    of missing values.
    """

    if TYPE_CHECKING:  # torch.jit.script cannot read these annotations
        first_column: Tensor
        first_threshold: Tensor
        first_children: Tensor
        column: Tensor
        threshold: Tensor

    def __init__(self, nodes: Nodes, table: np.ndarray, *, features: int, inclusive: bool) -> None:
        super().__init__()
        self.trees = nodes.trees
        self.inclusive = inclusive
        self.more_steps = max(nodes.depth - 1, 0)
        column = np.where(nodes.missing_left, nodes.feature, nodes.feature + features)
        # No comparison with NaN is true, not even that of infinity: a row stays in its leaf.
        threshold = np.where(nodes.is_leaf, np.float32(np.nan), nodes.threshold)
        self.register_buffer("column", torch.from_numpy(column[table].astype(np.int64)))
        self.register_buffer("threshold", torch.from_numpy(threshold[table].astype(np.float32)))
        self.register_buffer("first_column", torch.from_numpy(column[: nodes.trees].astype(np.int64)))
        self.register_buffer("first_threshold", torch.from_numpy(threshold[: nodes.trees].astype(np.float32)))

    def forward(self, features: Tensor) -> Tensor:
        both = torch.cat([features, features.masked_fill(torch.isnan(features), float("inf"))], dim=1)
        right = self.goes_right(both.index_select(1, self.first_column), self.first_threshold)
        index = self.first_children + right
        for _ in range(self.more_steps):
            flat = index.reshape(-1)
            values = both.gather(1, self.column.index_select(0, flat).view(-1, self.trees))
            right = self.goes_right(values, self.threshold.index_select(0, flat).view(-1, self.trees))
            index = self.left_child(index) + right
        return self.leaves(index)

    def left_child(self, index: Tensor) -> Tensor:
        """Return the index of the left child of each node (B, T)."""
        raise NotImplementedError

    def leaves(self, index: Tensor) -> Tensor:
        """Return the row of the table of leaves for each last node (B, T)."""
        raise NotImplementedError

    def goes_right(self, values: Tensor, thresholds: Tensor) -> Tensor:
        """Return 0 or 1 in the dtype of the indices, since PyTorch is ten times slower with mixed dtypes."""
        right = values >= thresholds if self.inclusive else values > thresholds
        return right.to(torch.int32)


class PerfectDescent(Descent):
    """Perfect layout: the node of index p has the children 2p and 2p + 1; the roots are T to 2T - 1."""

    def __init__(self, nodes: Nodes, levels: list[np.ndarray], *, features: int, inclusive: bool) -> None:
        unused = levels[0]  # the indices 0 to T - 1
        super().__init__(nodes, np.concatenate([unused, *levels[:-1]]), features=features, inclusive=inclusive)
        self.first_leaf = len(levels[-1])
        self.register_buffer("first_children", 2 * torch.arange(nodes.trees, 2 * nodes.trees, dtype=torch.int32))

    def left_child(self, index: Tensor) -> Tensor:
        """Return the index of the left child."""
        return index + index

    def leaves(self, index: Tensor) -> Tensor:
        """Index on the last level -> row of the table of leaves."""
        return index - self.first_leaf


class LinkedDescent(Descent):
    """Linked layout: the index is that of the table of nodes, and children are looked up."""

    if TYPE_CHECKING:  # torch.jit.script cannot read these annotations
        child: Tensor

    def __init__(self, nodes: Nodes, *, features: int, inclusive: bool) -> None:
        super().__init__(nodes, np.arange(len(nodes.child)), features=features, inclusive=inclusive)
        self.register_buffer("child", torch.from_numpy(nodes.child.astype(np.int32)))
        self.register_buffer("first_children", self.child[: nodes.trees].clone())

    def left_child(self, index: Tensor) -> Tensor:
        """Return the index of the left child; of a leaf, the leaf itself."""
        return self.child.index_select(0, index.reshape(-1)).view(-1, self.trees)

    def leaves(self, index: Tensor) -> Tensor:
        """Index of a node -> row of the table of leaves."""
        return index


def _descent(nodes: Nodes, *, features: int, inclusive: bool, layout: str | None) -> tuple[Descent, np.ndarray]:
    """Return the module, and the index of the node in each row of its table of leaves."""
    if (layout or ("perfect" if nodes.depth <= PERFECT_DEPTH else "linked")) == "linked":
        return LinkedDescent(nodes, features=features, inclusive=inclusive), np.arange(len(nodes.child))
    levels = [np.arange(nodes.trees)]
    for _ in range(max(nodes.depth, 1)):
        left = nodes.child[levels[-1]]
        levels.append(np.stack([left, left + ~nodes.is_leaf[levels[-1]]], axis=1).reshape(-1))
    return PerfectDescent(nodes, levels, features=features, inclusive=inclusive), levels[-1]


def _in_levels(
    roots: np.ndarray, left: np.ndarray, right: np.ndarray, **columns: np.ndarray
) -> tuple[Nodes, np.ndarray]:
    """Sort nodes in any order, with `left` negative at leaves, by level; return the table and the node of each row.

    Raises ValueError if a node is reached twice.
    """
    level = roots
    sizes: list[int] = []
    order: list[np.ndarray] = []
    children: list[np.ndarray] = []
    while len(level):
        inner = left[level] >= 0
        first, after = sum(sizes), sum(sizes) + len(level)
        if after > len(left):
            raise ValueError("a node has two parents")
        child = np.arange(first, after)
        child[inner] = after + 2 * np.arange(inner.sum())
        children.append(child)
        order.append(level)
        sizes.append(len(level))
        level = np.stack([left[level[inner]], right[level[inner]]], axis=1).reshape(-1)
    rows = np.concatenate(order)
    table = {name: column[rows] for name, column in columns.items()}
    return Nodes(child=np.concatenate(children).astype(np.int32), level_sizes=tuple(sizes), **table), rows


# XGBoost -------------------------------------------------------------------------------------------------------------
class BoosterProbabilities(nn.Module):
    """Softmax of the base scores plus the sums over R trees of each of C classes."""

    if TYPE_CHECKING:  # torch.jit.script cannot read these annotations
        values: Tensor
        base: Tensor

    def __init__(self, descent: Descent, values: np.ndarray, base: np.ndarray) -> None:
        super().__init__()
        self.descent = descent
        self.classes = len(base)
        self.rounds = descent.trees // len(base)
        self.register_buffer("values", torch.from_numpy(values))
        self.register_buffer("base", torch.from_numpy(base))

    def forward(self, features: Tensor) -> Tensor:
        leaf = self.descent(features).reshape(-1)
        scores = self.values.index_select(0, leaf).view(-1, self.rounds, self.classes).sum(dim=1) + self.base
        return torch.softmax(scores, dim=1)


def booster_module(
    text: str | bytes, *, classes: int, source: object, remedy: str, layout: str | None = None
) -> BoosterProbabilities:
    """Return the module of all trees of a `multi:softprob` booster, from XGBoost's JSON; XGBoost is not needed.

    Missing values of features (B, F) are NaN. Sums are float32 as in the library, but in another order: the
    probabilities of 1,300 trees differ by less than 1e-6. `layout` is perfect, linked, or None to select it by depth.
    Raises UserError with `source` and `remedy` for a damaged text, another version, or a booster of another kind.
    """
    expected = f"expected the JSON of a gbtree booster of XGBoost {'.'.join(map(str, XGBOOST[0]))} or newer"
    try:
        record = json.loads(text)
        version = tuple(int(part) for part in record["version"])
        learner = record["learner"]
    except _OF_ANOTHER_FORM as error:
        raise UserError(f"{source}: damaged, {error!r}; {expected}. {remedy}") from error
    if not XGBOOST[0] <= version[:2] < XGBOOST[1]:
        written = ".".join(map(str, version))
        raise UserError(f"{source}: written by XGBoost {written}; {expected}, below {XGBOOST[1][0]}. {remedy}")
    try:
        features, base, nodes, values = _booster(learner, classes)
    except _OF_ANOTHER_FORM as error:
        words = str(error) if type(error) is ValueError else repr(error)
        raise UserError(f"{source}: damaged or of another kind, {words}; {expected}. {remedy}") from error
    descent, leaf_nodes = _descent(nodes, features=features, inclusive=True, layout=layout)
    return BoosterProbabilities(descent, values[leaf_nodes], base)


def _booster(learner: Mapping[str, Any], classes: int) -> tuple[int, np.ndarray, Nodes, np.ndarray]:
    """Return the number of features, base scores (C,), the nodes in rounds of C trees, and the nodes' values (K,)."""
    parameters, booster = learner["learner_model_param"], learner["gradient_booster"]
    _expect("objective", learner["objective"]["name"], "multi:softprob")
    _expect("booster", booster["name"], "gbtree")
    _expect("num_class", int(parameters["num_class"]), classes)
    features, model = int(parameters["num_feature"]), booster["model"]
    # One number up to XGBoost 3.0, one per class from 3.1 on. This objective uses them without a transformation.
    with np.errstate(over="ignore"):
        base = np.atleast_1d(np.array(json.loads(parameters["base_score"]), dtype=np.float32))
    if base.shape not in ((1,), (classes,)) or not np.isfinite(base).all():
        raise ValueError(f"base_score is {parameters['base_score']}")
    trees, owners = model["trees"], np.array(model["tree_info"], dtype=np.int64)
    _expect("num_trees", int(model["gbtree_model_param"]["num_trees"]), len(trees))
    if not len(trees) or not np.array_equal(np.bincount(owners, minlength=classes), [len(trees) / classes] * classes):
        raise ValueError(f"{len(trees)} trees are not spread evenly over {classes} classes")
    by_round = np.argsort(owners, kind="stable").reshape(classes, -1).T.reshape(-1)
    sizes = np.array([len(tree["left_children"]) for tree in trees])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def column(name: str, dtype: type) -> np.ndarray:
        with np.errstate(over="ignore"):  # checked below: a value beyond the type becomes infinite
            parts: list[np.ndarray] = [np.array(tree[name], dtype=dtype) for tree in trees]
        if any(part.shape != (size,) for part, size in zip(parts, sizes, strict=True)):
            raise ValueError(f"{name} has not one entry for each node")
        return np.concatenate(parts)

    if column("split_type", np.int64).any():
        raise ValueError("it splits by categories")
    tree_sizes, start = np.repeat(sizes, sizes), np.repeat(starts, sizes)
    left, right = column("left_children", np.int64), column("right_children", np.int64)
    feature, values = column("split_indices", np.int64), column("split_conditions", np.float32)
    inner = left >= 0
    if not (np.where(inner, np.maximum(left, right), 0) < tree_sizes).all() or (right[inner] < 0).any():
        raise ValueError("a child is not in its tree")
    feature = np.where(inner, feature, 0)  # a pruned node has no feature
    if not ((feature >= 0) & (feature < features)).all() or not np.isfinite(values).all():
        raise ValueError(f"a feature is not one of {features}, or a number is not finite")
    nodes, rows = _in_levels(
        starts[by_round],
        np.where(inner, left + start, -1),
        np.where(inner, right + start, -1),
        feature=feature.astype(np.int32),
        threshold=values,
        missing_left=column("default_left", np.bool_),
    )
    return features, np.broadcast_to(base, classes).copy(), nodes, values[rows]


def _expect(what: str, value: object, expected: object) -> None:
    if value != expected:
        raise ValueError(f"{what} is {value!r}, not {expected!r}")


# scikit-learn --------------------------------------------------------------------------------------------------------
class ForestProbabilities(nn.Module):
    """Mean over T trees of the class probabilities of the reached leaf."""

    if TYPE_CHECKING:  # torch.jit.script cannot read these annotations
        values: Tensor

    def __init__(self, descent: Descent, values: np.ndarray) -> None:
        super().__init__()
        self.descent = descent
        self.trees = descent.trees
        self.classes = values.shape[1]
        self.register_buffer("values", torch.from_numpy(values))

    def forward(self, features: Tensor) -> Tensor:
        leaf = self.descent(features).reshape(-1)
        return self.values.index_select(0, leaf).view(-1, self.trees, self.classes).mean(dim=1)


def forest_arrays(estimator: RandomForestClassifier, *, classes: int, shrinkage: float = 0.0) -> dict[str, np.ndarray]:
    """Return a fitted forest, whose labels are in 0..C-1, as numeric arrays for `forest_module`.

    Without `shrinkage` the module equals the library's `predict_proba`. With it, the probabilities of a node are shrunk
    towards its parent's by the weight of `shrinkage` rows, compared with the rows of the parent, and those of a root
    towards the uniform distribution by the weight of one row, so that none is 0. Agarwal, Tan, Ronen, Singh and Yu
    (2022), Hierarchical Shrinkage.
    """
    trees = [tree.tree_ for tree in estimator.estimators_]
    sizes = np.array([tree.node_count for tree in trees])
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    left = np.concatenate([tree.children_left for tree in trees])
    right = np.concatenate([tree.children_right for tree in trees])
    # A threshold of infinity separates missing values from all others; so does the largest number, since missing values
    # are replaced by infinity.
    exact = np.concatenate([tree.threshold for tree in trees]).clip(max=np.finfo(np.float32).max)
    # Features are float32, thresholds float64: a float32 is above a threshold if it is above the largest float32 that
    # is not.
    threshold = exact.astype(np.float32)
    threshold = np.where(threshold > exact, np.nextafter(threshold, np.float32(-np.inf)), threshold)
    nodes, rows = _in_levels(
        np.cumsum(sizes) - sizes,
        np.where(left < 0, -1, left + start),
        np.where(left < 0, -1, right + start),
        feature=np.concatenate([tree.feature for tree in trees]).clip(0).astype(np.int32),
        threshold=threshold,
        missing_left=np.concatenate([tree.missing_go_to_left for tree in trees]).astype(bool),
    )
    probabilities = np.zeros((len(rows), classes))
    probabilities[:, estimator.classes_] = np.concatenate([tree.value[:, 0] for tree in trees])[rows]
    if shrinkage:
        counts = np.concatenate([tree.weighted_n_node_samples for tree in trees])[rows, None]
        probabilities = _shrunken(nodes, probabilities, counts, shrinkage)
    return {
        "child": nodes.child,
        "feature": nodes.feature,
        "leaves": probabilities[nodes.is_leaf].astype(np.float32),
        "level_sizes": np.array(nodes.level_sizes),
        "missing_left": nodes.missing_left,
        "threshold": nodes.threshold,
        "width": np.array([estimator.n_features_in_]),
    }


def _shrunken(nodes: Nodes, probabilities: np.ndarray, counts: np.ndarray, shrinkage: float) -> np.ndarray:
    """Shrink the class probabilities (K, C) of nodes with `counts` (K, 1) rows, from the roots down; return (K, C)."""
    raw, shrunken = probabilities.copy(), np.empty_like(probabilities)
    roots = slice(nodes.trees)
    raw[roots] = (probabilities[roots] * counts[roots] + 1 / probabilities.shape[1]) / (counts[roots] + 1)
    shrunken[roots] = raw[roots]
    ends = np.cumsum(nodes.level_sizes)
    for end, size in zip(ends, nodes.level_sizes, strict=True):
        inner = np.flatnonzero(~nodes.is_leaf[end - size : end]) + end - size
        for child in (nodes.child[inner], nodes.child[inner] + 1):
            shrunken[child] = shrunken[inner] + (raw[child] - raw[inner]) / (1 + shrinkage / counts[inner])
    return shrunken


def forest_module(arrays: Mapping[str, np.ndarray], *, layout: str | None = None) -> ForestProbabilities:
    """Return the module for arrays of `forest_arrays`; `layout` is perfect, linked, or None to select it by depth."""
    nodes = Nodes(
        child=arrays["child"],
        feature=arrays["feature"],
        threshold=arrays["threshold"],
        missing_left=arrays["missing_left"].astype(bool),
        level_sizes=tuple(arrays["level_sizes"].tolist()),
    )
    values = np.zeros((len(nodes.child), arrays["leaves"].shape[1]), dtype=np.float32)
    values[nodes.is_leaf] = arrays["leaves"]
    descent, leaf_nodes = _descent(nodes, features=int(arrays["width"][0]), inclusive=False, layout=layout)
    return ForestProbabilities(descent, values[leaf_nodes])


def probabilities(module: nn.Module, features: np.ndarray) -> np.ndarray:
    """Apply a module of trees to features (N, F); return probabilities float64 (N, C) whose rows sum to 1."""
    rows = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
    with torch.inference_mode():
        outputs = torch.cat([module(block) for block in rows.split(BLOCK)]).numpy().astype(np.float64)
    return outputs / outputs.sum(axis=1, keepdims=True)
