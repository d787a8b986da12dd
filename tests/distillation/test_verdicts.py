"""What is said of a student: how often it errs on two networks of one recipe, and what needs several seeds."""

from __future__ import annotations

import numpy as np
import pytest

from utils.distillation.verdicts import METRICS, Difference, difference, outcome, schedule_note, speed_text

CLASSES, ROWS, SIMULATIONS = 4, 400, 500
LABELS = np.arange(ROWS) % CLASSES


def trained(rng: np.random.Generator, difficulty: np.ndarray, seeds: int, spread: float) -> np.ndarray:
    """Probabilities (K, N, C) of trainings of one recipe.

    They share the difficulty of the rows, vary by row, and each is better or worse as a whole by `spread`.
    """
    margin = difficulty + rng.normal(size=(seeds, ROWS)) + spread * rng.normal(size=(seeds, 1))
    logits = rng.normal(size=(seeds, ROWS, CLASSES)) * 0.3
    logits[:, np.arange(ROWS), LABELS] += margin
    raised = np.exp(logits)
    return raised / raised.sum(axis=2, keepdims=True)


def error_rate(seeds: int, spread: float) -> float:
    """Fraction of simulations in which something is said of two arms of one recipe."""
    rng = np.random.default_rng(seeds)
    errors = 0
    for _ in range(SIMULATIONS):
        difficulty = 2.5 + 1.5 * rng.normal(size=ROWS)
        arms = [trained(rng, difficulty, seeds, spread) for _ in range(2)]
        differences = {metric: difference(*arms, LABELS, metric) for metric in METRICS}
        errors += "cannot be told apart" not in outcome(differences, seeds=seeds)
    return errors / SIMULATIONS


def test_two_networks_of_one_recipe_are_told_apart_in_six_percent_of_simulations_at_most():
    assert error_rate(1, 0.0) <= 0.06


def test_networks_that_are_equal_in_groups_of_rows_are_rarely_told_apart():
    rng = np.random.default_rng(0)
    groups = np.arange(ROWS) // 5
    errors = 0
    for _ in range(SIMULATIONS):
        first_rows = trained(rng, 2.5 + 1.5 * rng.normal(size=ROWS), 6, 0.0)[:, ::5].repeat(5, axis=1)
        labels = LABELS[::5].repeat(5)
        arms = (first_rows[:3], first_rows[3:])
        differences = {metric: difference(*arms, labels, metric, groups) for metric in METRICS}
        errors += "cannot be told apart" not in outcome(differences, seeds=3)
    assert errors / SIMULATIONS <= 0.06


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_a_recipe_does_not_help_itself_however_much_its_trainings_vary(spread):
    assert error_rate(3, spread) <= 0.06


def test_a_real_difference_is_seen():
    rng = np.random.default_rng(0)
    better, worse = trained(rng, np.full(ROWS, 3.0), 3, 0.1), trained(rng, np.full(ROWS, 1.0), 3, 0.1)
    for metric in METRICS:
        assert difference(better, worse, LABELS, metric).sign == 1
        assert difference(worse, better, LABELS, metric).sign == -1


def test_a_difference_of_accuracies_is_that_of_the_means():
    rng = np.random.default_rng(1)
    arms = [trained(rng, np.full(ROWS, margin), 2, 0.1) for margin in (2.0, 1.0)]
    accuracies = [np.mean([(one.argmax(axis=1) == LABELS).mean() for one in arm]) for arm in arms]
    assert difference(*arms, LABELS, "accuracy").value == pytest.approx(accuracies[0] - accuracies[1])


UP, DOWN, LEVEL = Difference(0.1, 0.05, 0.15), Difference(-0.1, -0.15, -0.05), Difference(0.01, -0.02, 0.04)


@pytest.mark.parametrize(
    ("accuracy", "loss", "seeds", "words"),
    [
        (UP, UP, 1, "for this network distillation helped in accuracy and log-loss"),
        (UP, LEVEL, 2, "for this network distillation helped in accuracy"),
        (UP, LEVEL, 3, "with 3 seeds per arm the recipe helped in accuracy"),
        (DOWN, UP, 3, "with 3 seeds per arm the recipe helped in log-loss and harmed accuracy"),
        (LEVEL, DOWN, 1, "for this network distillation harmed log-loss"),
        (LEVEL, LEVEL, 1, "this network cannot be told apart from the same network trained without a teacher"),
        (LEVEL, LEVEL, 4, "the recipe, with 4 seeds per arm, cannot be told apart from the same network trained"),
    ],
)
def test_helped_is_said_of_a_recipe_only_with_three_seeds_per_arm(accuracy, loss, seeds, words):
    assert outcome({"accuracy": accuracy, "log_loss": loss}, seeds=seeds).startswith(words)


@pytest.mark.parametrize(
    ("times", "points", "text"),
    [
        ((1.0, 12.0), -0.2, "12 times faster than the teacher, 0.2 points behind"),
        ((2.0, 5.0), 0.4, "2.5 times faster than the teacher, 0.4 points ahead"),
        ((4.0, 2.0), -1.0, "2.0 times slower than the teacher, 1.0 points behind"),
        ((4.0, None), -1.0, None),
    ],
)
def test_the_speed_is_stated_with_the_points(times, points, text):
    costs = {key: {"latency_ms": time and {"batch_1": {"p50": time}}} for key, time in zip("ab", times, strict=True)}
    assert speed_text(costs, "a", "b", points) == text


def curve(*losses: float) -> list[dict[str, float]]:
    return [{"val_log_loss": loss} for loss in losses]


def test_a_schedule_is_too_short_while_the_network_alone_still_improves():
    falling = curve(*np.linspace(2.0, 0.5, 20))
    note = schedule_note(falling, 20)
    assert note is not None
    assert "over the last 2 of 20 epochs" in note
    assert "--set distillation.epochs=40" in note
    assert schedule_note(curve(*np.linspace(2.0, 0.5, 10), *[0.5] * 10), 20) is None
    assert schedule_note(curve(1.0), 1) is None
