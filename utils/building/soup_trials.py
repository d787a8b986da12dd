"""Checkpoints of one backbone and their mixtures: scores on the val split and tests of linear connectivity."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import base_back
from utils.core.artifacts import digest_of
from utils.core.display_text import first_names
from utils.core.errors import UserError
from utils.networks import construction, memory, soups
from utils.networks.checkpoints import read_checkpoint, state_dict_of
from utils.networks.preprocessing import Preprocessing
from utils.networks.soups import Ingredient
from utils.numeric.metrics import METRICS, log_loss_per_row, softmax
from utils.predictions import catalog, image_splits, streaming
from utils.predictions.catalog import Member
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

SHARED = 0.1  # least cosine of weights of networks with the same initialisation; that of others is below 0.03
TOLERATED = 0.02  # rise of a midpoint's error over its better end that counts as noise (Frankle et al. 2020: the mean)
TOLERATED_ROWS = 1.5  # one more wrong row is always tolerated, also with few images
TOLERATED_LOSS = 0.1  # rise of the log-loss in nats, since error rates of few images are imprecise
ALL_PAIRS = 4  # most checkpoints for which every pair is tested; with more, each is paired with the best one
BATCHES = 100
KEPT_BYTES = 64 * 2**20  # of all checkpoints of a member, up to which they stay in memory
FEWEST_IMAGES = 16  # per batch, since the variance of fewer is imprecise

Mix = tuple[tuple[str, int], ...]
"""(name of an ingredient, its share), sorted by name."""


@dataclass(frozen=True)
class SoupScores:
    """Scores of one network on the val rows."""

    score: float
    """By `runs.score_ensemble.optimization_metric`"""
    accuracy: float
    log_loss: float
    rank: tuple[float, float]
    """Score, then log-loss, with signs so that higher is better."""
    hits: np.ndarray = field(compare=False, repr=False)
    """bool (N,): whether the row is classified correctly"""
    losses: np.ndarray = field(compare=False, repr=False)
    """Log-loss of each row (N,) in nats"""

    def as_record(self) -> dict[str, float]:
        """Return the scores as JSON values."""
        return {"score": self.score, "accuracy": self.accuracy, "log_loss": self.log_loss}


@dataclass(frozen=True)
class Trial:
    """Scores of a mixture with averaged BatchNorm statistics of its ingredients, and with recomputed statistics."""

    averaged: SoupScores
    recomputed: SoupScores | None
    """None if there is nothing to recompute, or if recomputation is switched off."""

    @property
    def is_recomputed(self) -> bool:
        """Whether the recomputed statistics are better; the averaged ones win ties."""
        return self.recomputed is not None and self.recomputed.rank > self.averaged.rank

    @property
    def kept(self) -> SoupScores:
        """Scores with the better statistics."""
        return self.recomputed if self.recomputed is not None and self.is_recomputed else self.averaged

    def as_record(self) -> dict[str, Any]:
        """Return both scores and which are kept, as JSON values."""
        return {
            "averaged": self.averaged.as_record(),
            "recomputed": self.recomputed.as_record() if self.recomputed else None,
            "kept": "recomputed" if self.is_recomputed else "averaged",
        }


@dataclass(frozen=True)
class Pair:
    """Two checkpoints and the midpoint of the line between their weights."""

    names: tuple[str, str]
    similarity: float
    """Cosine of the weights"""
    error: float
    """Error barrier: error rate of the midpoint minus the mean of the ends."""
    log_loss: float
    """Log-loss barrier in nats."""
    error_rise: float
    """Error rate of the midpoint minus that of the better end."""
    log_loss_rise: float
    """Log-loss of the midpoint minus that of the better end, in nats."""
    is_recomputed: bool
    """Whether the midpoint was better with recomputed BatchNorm statistics."""
    is_connected: bool
    """Whether the weights are similar and the midpoint is no worse than the better end, within the tolerances."""

    def as_record(self) -> dict[str, Any]:
        """Return the pair as JSON values."""
        return {
            "between": list(self.names),
            "similarity": round(self.similarity, 4),
            "error_barrier": self.error,
            "log_loss_barrier": self.log_loss,
            "error_rise": self.error_rise,
            "log_loss_rise": self.log_loss_rise,
            "recomputed": self.is_recomputed,
            "connected": self.is_connected,
        }


class Trials:
    """Scores of mixtures; each mixture is computed and run once, with one network in memory at a time."""

    def __init__(self, store: Store, member: Member, ingredients: Mapping[str, Ingredient]) -> None:
        self.store = store
        self.member = member
        self.ingredients = ingredients
        self.spec = member.network(store.workspace)
        self.device = streaming.resolve_device(store.config.device)
        self.threads = image_splits.decoding_threads(store.config.dataset.num_workers)
        first = next(iter(ingredients.values())).open()
        normalised = any(name.endswith("running_mean") for name in first)
        self.recomputes = normalised and store.config.runs.model_soup.recompute_bn
        self.bn_threads: int | None = None
        """Intra-op threads with which BatchNorm statistics were recomputed; None on a GPU, and if none were."""
        self._known: dict[tuple[Mix, bool], SoupScores] = {}

    def single(self, name: str) -> SoupScores:
        """Return the scores of one checkpoint."""
        return self._figures(((name, 1),))

    def trial(self, mix: Mix) -> Trial:
        """Score a mixture with both kinds of statistics; those of a single checkpoint are not recomputed."""
        if (mix, True) not in self._known and self.recomputes and len(mix) > 1:
            weights = self.weights(mix, recompute=False)
            self._figures(mix, weights)
            self._known[mix, True] = self._scored(mix, self._recomputed(mix, weights))
        return Trial(self._figures(mix), self._known.get((mix, True)))

    def weights(self, mix: Mix, *, recompute: bool) -> Mapping[str, Tensor]:
        """Return the state dict of a mixture."""
        if len(mix) == 1:
            return self.ingredients[mix[0][0]].open()
        mixed = soups.weighted_average([self.ingredients[name] for name, _ in mix], [share for _, share in mix])
        return self._recomputed(mix, mixed) if recompute else mixed

    def _recomputed(self, mix: Mix, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        model = streaming.open_network(self._named(mix), weights).to(self.device)
        rule = base_back.load_bundled("threads")
        self.bn_threads = rule.threads_of_network("normalisation", model, self.spec.img_size, self.device)
        try:
            with rule.intra_op_threads(self.bn_threads):
                soups.recompute_bn_statistics(model, self._train_batches(), BATCHES)
            return {**weights, **soups.statistics_of(model)}
        finally:
            memory.safe_delete_model(model)

    def _figures(self, mix: Mix, weights: Mapping[str, Tensor] | None = None) -> SoupScores:
        """Return the scores with averaged statistics; `weights` are those of the mixture if they are in memory."""
        if (mix, False) not in self._known:
            self._known[mix, False] = self._scored(mix, weights or self.weights(mix, recompute=False))
        return self._known[mix, False]

    def _scored(self, mix: Mix, weights: Mapping[str, Tensor]) -> SoupScores:
        batches = streaming.stream(
            self._named(mix),
            [self._val],
            batch_size=self.store.config.dataset.batch_size,
            device=self.device,
            image_cache=self.store.workspace.image_cache,
            decoding_threads=self.threads,
            opener=partial(streaming.open_network, weights=weights),
        )
        order = [self.member.classes.index(name) for name in self.store.catalog.classes]
        probabilities = softmax(np.concatenate([batch.logits for batch in batches])[:, order])
        labels = self._val.labels
        metric = METRICS[self.store.config.runs.score_ensemble.optimization_metric]
        score, losses = metric.function(probabilities, labels), log_loss_per_row(probabilities, labels)
        hits, loss = probabilities.argmax(axis=1) == labels, float(losses.mean())
        rank = (score if metric.higher_is_better else -score, -loss)
        return SoupScores(score, float(hits.mean()), loss, rank, hits, losses)

    def _named(self, mix: Mix) -> construction.NetworkSpec:
        """Return a specification whose path names the ingredients, for messages; the file does not exist yet."""
        parts = " + ".join(name for name, _ in mix)
        return replace(self.spec, checkpoint=self.spec.checkpoint.with_name(f"{self.member.name}: {parts}"))

    @cached_property
    def _val(self) -> ImageSplit:
        return self.store.images("val")

    @cached_property
    def _shuffled(self) -> tuple[ImageSplit, Any, int]:
        """Train images in a seeded order, their pixels, and the batch size; every batch is full.

        In the order of the folders a batch would contain a single class, and its statistics would not be those of the
        data.
        """
        train = self.store.images("train")
        size = min(max(self.store.config.dataset.batch_size, FEWEST_IMAGES), len(train.paths))
        count = min(BATCHES, len(train.paths) // size) * size
        order = np.random.default_rng(self.store.config.seed).permutation(len(train.paths))[:count]
        images = train.take(order)
        cache = self.store.workspace.image_cache
        pixels = image_splits.open_images(images, self.spec.preprocessing, image_cache=cache, threads=self.threads)
        return images, pixels, size

    def _train_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, pixels, size = self._shuffled
        for start in range(0, len(images.paths), size):
            crops = torch.from_numpy(pixels.crops(range(start, start + size)))
            images_in = image_splits.normalise(crops, self.spec.preprocessing)
            yield images_in, torch.from_numpy(images.labels[start : start + size])

    def pair(self, one: str, other: str) -> Pair:
        """Test whether two checkpoints are linearly connected.

        A barrier is a rise over the mean of the ends. Between a good and an unfinished network the loss falls without a
        barrier, but the midpoint is worse than the good network: the midpoint is therefore compared with the better
        end. If it is worse, it is also scored with recomputed BatchNorm statistics, since averaged ones may be the only
        cause (REPAIR, Jordan et al. 2022).
        """
        similarity = soups.weight_cosine(self.ingredients[one], self.ingredients[other])
        ends = (self.single(one), self.single(other))
        better = max(ends, key=lambda end: end.rank)
        allowed = max(TOLERATED, TOLERATED_ROWS / len(self._val.labels)) + 1e-9

        def comes_up(middle: SoupScores) -> bool:
            return better.accuracy - middle.accuracy <= allowed and middle.log_loss - better.log_loss <= TOLERATED_LOSS

        mix: Mix = tuple(sorted(((one, 1), (other, 1))))
        middle, is_recomputed = self._figures(mix), False
        if similarity >= SHARED and self.recomputes and not comes_up(middle):
            trial = self.trial(mix)
            middle, is_recomputed = trial.kept, trial.is_recomputed
        return Pair(
            names=(one, other),
            similarity=similarity,
            error=soups.error_barrier(1 - ends[0].accuracy, 1 - ends[1].accuracy, 1 - middle.accuracy),
            log_loss=soups.error_barrier(ends[0].log_loss, ends[1].log_loss, middle.log_loss),
            error_rise=better.accuracy - middle.accuracy,
            log_loss_rise=middle.log_loss - better.log_loss,
            is_recomputed=is_recomputed,
            is_connected=similarity >= SHARED and comes_up(middle),
        )


# survey of checkpoints -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """Checkpoints of one backbone that may be averaged, and their scores."""

    trials: Trials
    connected: tuple[str, ...]
    """Stages that may be averaged, the best on val first."""
    pairs: tuple[dict[str, Any], ...]
    ingredients: tuple[dict[str, Any], ...]
    """All checkpoints: stage, path, sha256, scores on val, and `left_out`, the reason or null."""


def survey_checkpoints(store: Store, member: Member, entries: Sequence[Mapping[str, str]]) -> Survey:
    """Score a backbone's checkpoints and test which of them are usable and linearly connected.

    `entries` are those of the catalog, the one that the member uses first; the anchor is the best on val of those that
    share its initialisation. Raises UserError if the first checkpoint cannot be used.
    """
    used = entries[0]["stage"]
    ingredients, left_out = _usable(store, member, entries)
    trials = Trials(store, member, ingredients)
    figures = {}
    for name in ingredients:
        try:
            figures[name] = trials.single(name)
        except UserError as error:
            if name == used:
                raise
            logger.warning("%s; left out of the soups of %s", error, member.name)
            left_out[name] = str(error)
    ordered = sorted(figures, key=lambda name: (-figures[name].rank[0], -figures[name].rank[1], name))
    similarities = {name: soups.weight_cosine(ingredients[used], ingredients[name]) for name in ordered}
    related = [name for name in ordered if similarities[name] >= SHARED]
    unrelated = [name for name in ordered if name not in related]
    left_out |= dict.fromkeys(unrelated, "another initialisation")
    pairs = _pairs(trials, related, unrelated)
    connected: list[str] = []
    for name in related:
        barrier = next(
            (p for p in pairs if not p.is_connected and name in p.names and set(p.names) & set(connected)), None
        )
        if barrier is None:
            connected.append(name)
        else:
            other = next(end for end in barrier.names if end != name)
            left_out[name] = (
                f"halfway to {other} the error rises by {barrier.error_rise:.4f}, "
                f"the log-loss by {barrier.log_loss_rise:.4f}"
            )
    for name, reason in left_out.items():
        logger.debug("%s %s: left out of its soups: %s", member.name, name, reason)
    entries_tried = tuple(
        {**entry, "left_out": left_out.get(name)} | (figures[name].as_record() if name in figures else {})
        for name, entry in ((entry["stage"], entry) for entry in entries)
    )
    return Survey(trials, tuple(connected), tuple(pair.as_record() for pair in pairs), entries_tried)


def _pairs(trials: Trials, related: Sequence[str], unrelated: Sequence[str]) -> list[Pair]:
    """Pair the best checkpoint with every other; with few related checkpoints, also all those connected with it."""
    pairs = [trials.pair(related[0], name) for name in (*related[1:], *unrelated)]
    if len(related) <= ALL_PAIRS:
        near = [pair.names[1] for pair in pairs if pair.is_connected]
        pairs += [trials.pair(*names) for names in combinations(near, 2)]
    return pairs


def _usable(
    store: Store, member: Member, entries: Sequence[Mapping[str, str]]
) -> tuple[dict[str, Ingredient], dict[str, str]]:
    """Return distinct checkpoints that are compatible with the first, and {stage: reason} of the others."""
    ingredients: dict[str, Ingredient] = {}
    left_out: dict[str, str] = {}
    stage_of: dict[str, str] = {}
    first_preprocessing: Preprocessing | None = None
    paths = [store.workspace.base / entry["path"] for entry in entries]
    keeps = sum(path.stat().st_size for path in paths if path.is_file()) <= KEPT_BYTES
    for entry, path in zip(entries, paths, strict=True):
        stage, opener = entry["stage"], partial(_weights, path)
        ingredient = Ingredient(stage, cache(opener) if keeps else opener)
        try:
            catalog.check_current(store.workspace, member, store.digests, stage)
            weights = ingredient.open()
            preprocessing = _recorded_preprocessing(path)
        except UserError as error:
            if not ingredients:
                raise
            logger.warning("%s; left out of the soups of %s", error, member.name)
            left_out[stage] = str(error)
            continue
        first = next(iter(ingredients.values())).open() if ingredients else weights
        if lines := soups.state_dict_differences(first, weights):
            reason = first_names(lines, 1)
            logger.warning("%s: left out of the soups of %s: %s", path, member.name, reason)
            left_out[stage] = f"other tensors than {entries[0]['stage']}: {reason}"
            continue
        if not ingredients:
            first_preprocessing = preprocessing
        elif preprocessing != first_preprocessing:
            logger.warning("%s: left out of the soups of %s: made for other preprocessing", path, member.name)
            left_out[stage] = f"other preprocessing than {entries[0]['stage']}"
            continue
        original = stage_of.setdefault(_weights_digest(store, entry["sha256"], weights), stage)
        if original == stage:
            ingredients[stage] = ingredient
        else:
            left_out[stage] = f"the weights of {original}"
    return ingredients, left_out


def _recorded_preprocessing(path: Path) -> Preprocessing | None:
    extra = read_checkpoint(path).get("extra")
    record = extra.get("preprocessing") if isinstance(extra, dict) else None
    return None if record is None else Preprocessing.from_record(record, f"{path}: extra.preprocessing")


def _weights(path: Path) -> Mapping[str, Tensor]:
    weights = state_dict_of(read_checkpoint(path))
    others = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if others or not weights:
        raise UserError(
            f"{path}: no weights ({', '.join(map(str, others[:3])) or 'empty'}); expected a dictionary of tensors. "
            "Remove the file, then run discover again"
        )
    return weights


def _weights_digest(store: Store, sha256: str, weights: Mapping[str, Tensor]) -> str:
    """Return the digest of the weights only, cached by the digest of the file."""
    key = digest_of(["weights", sha256])
    digest: str | None = store.digests.facts(key)
    if digest is None:
        digest = soups.weights_digest(weights)
        store.digests.keep(key, digest)
    return digest
