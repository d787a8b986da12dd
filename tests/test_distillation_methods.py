"""The loss of distillation against its closed form, mixed images, the average of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from utils.distillation_methods import (
    Mixing,
    WeightAverage,
    draw_mixing,
    embedding_loss,
    standardised,
    student_loss,
    teacher_loss,
)

B, C = 6, 5


def given(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits, labels, teacher log-probabilities, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, C, generator=generator, dtype=torch.float64)
    teacher = torch.log_softmax(3 * torch.randn(B, C, generator=generator, dtype=torch.float64), dim=1)
    return logits.requires_grad_(), torch.randint(C, (B,), generator=generator), teacher


def soft(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_loss_and_gradient_are_the_closed_form(temperature):
    logits, _, teacher = given()
    loss = teacher_loss(logits, teacher, temperature)
    loss.backward()
    p, q = soft(teacher.numpy() / temperature), soft(logits.detach().numpy() / temperature)
    assert loss.item() == pytest.approx(temperature**2 * (p * np.log(p / q)).sum() / B, rel=1e-12)
    np.testing.assert_allclose(logits.grad.numpy(), temperature * (q - p) / B, atol=1e-14)


def parts(alpha: float, smoothing: float = 0.0, distilled=None, labelled=None, mixing=None) -> float:
    logits, labels, teacher = given()
    everything = torch.ones(B, dtype=torch.bool)
    return student_loss(
        *(logits, labels, teacher),
        distilled=everything if distilled is None else distilled,
        labelled=everything if labelled is None else labelled,
        mixing=mixing,
        criterion=nn.CrossEntropyLoss(label_smoothing=smoothing),
        temperature=4.0,
        alpha=alpha,
    ).item()


def test_predicting_the_mean_of_standardised_embeddings_costs_one():
    embeddings = np.random.default_rng(0).normal(3, [0.1, 5, 40], size=(50, 3)).astype(np.float32)
    embeddings[:, 1] = 7  # constant: it tells nothing and counts as nothing
    scaled = standardised(embeddings)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(axis=0), [1, 0, 1], atol=1e-6)
    target = torch.from_numpy(scaled[:, [0, 2]])
    assert embedding_loss(torch.zeros_like(target), target).item() == pytest.approx(1, abs=1e-5)
    assert embedding_loss(target, target).item() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_is_the_share_of_the_teacher_s_part(alpha):
    logits, labels, teacher = given()
    own = nn.functional.cross_entropy(logits, labels).item()
    assert parts(alpha) == pytest.approx(alpha * teacher_loss(logits, teacher, 4.0).item() + (1 - alpha) * own)


def test_label_smoothing_touches_the_labels_part_alone():
    assert parts(1.0, smoothing=0.1) == parts(1.0)
    assert parts(0.0, smoothing=0.1) != parts(0.0)


def test_each_part_is_the_mean_over_its_own_rows_and_nothing_without_any():
    logits, labels, teacher = given()
    first, none = torch.arange(B) < 2, torch.zeros(B, dtype=torch.bool)
    wanted = 0.5 * teacher_loss(logits[:2], teacher[:2], 4.0) + 0.5 * nn.functional.cross_entropy(
        logits[2:], labels[2:]
    )
    assert parts(0.5, distilled=first, labelled=~first) == pytest.approx(wanted.item())
    assert parts(0.5, distilled=none, labelled=none) == 0
    assert parts(0.5, labelled=none) == pytest.approx(0.5 * teacher_loss(logits, teacher, 4.0).item())


def test_a_mixed_label_counts_by_its_share():
    logits, labels, _ = given()
    mixing = Mixing(torch.tensor([1, 0, 3, 2, 5, 4]), 0.7, None)
    one, other = (nn.functional.cross_entropy(logits, each).item() for each in (labels, labels[mixing.partner]))
    assert parts(0.0, mixing=mixing) == pytest.approx(0.7 * one + 0.3 * other)


def test_images_are_blended_or_pasted_by_the_share():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 10, 10).clone()
    blended = Mixing(torch.tensor([1, 2, 3, 0]), 0.25, None).images(images)
    assert torch.allclose(blended[0], torch.full((3, 10, 10), 0.75))
    pasted = Mixing(torch.tensor([1, 2, 3, 0]), 0.75, (0.5, 1.0, 0.0, 0.5)).images(images)
    assert (pasted[2, :, 5:, :5] == 3).all()
    assert (pasted[2] == 2).float().mean() == 0.75
    assert (images[2] == 2).all()  # the shown ones stay as they are


def test_targets_of_unmixed_images_are_mixed_as_probabilities():
    _, _, teacher = given()
    for weight in (0.7, 1.0, 0.0):
        mixing = Mixing(torch.tensor([1, 0, 3, 2, 5, 4]), weight, None)
        expected = weight * teacher.exp() + (1 - weight) * teacher[mixing.partner].exp()
        assert torch.allclose(mixing.log_probabilities(teacher).exp(), expected)


def test_both_draws_either_kind():
    kinds = {draw_mixing("both", 4, np.random.default_rng(seed)).box is None for seed in range(20)}
    assert kinds == {True, False}


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_drawn_mixing_follows_from_the_seed_and_its_box_is_its_share(kind):
    drawn = [draw_mixing(kind, 8, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0].partner, drawn[1].partner)
    assert drawn[0].weight == drawn[1].weight != drawn[2].weight
    assert sorted(drawn[0].partner.tolist()) == list(range(8))
    if kind == "cutmix":
        top, bottom, left, right = drawn[0].box
        assert (bottom - top) * (right - left) == pytest.approx(1 - drawn[0].weight)
        assert min(top, left) >= 0
        assert max(bottom, right) <= 1 + 1e-12


def test_the_average_follows_slowly_and_copies_counters():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, decay=0.9)
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(5.0)
        model.num_batches_tracked.fill_(step)
        average.update()
        if step == 1:
            assert 4 < average.weights["weight"][0] < 5  # few steps are remembered shortly
    assert average.weights["weight"][0] == pytest.approx(5, abs=1e-3)
    assert average.weights["num_batches_tracked"] == 199
    again = WeightAverage(model, decay=0.9)
    again.restore(average.weights, average.steps)
    assert torch.equal(again.weights["weight"], average.weights["weight"])
    assert again.steps == 199
