"""Torch modules of stackers and fusers against numpy."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from torch import nn

from utils.combiners.gates import AttentionGate
from utils.combiners.heads import MeanOfProbabilities
from utils.combiners.logistic import Coefficients
from utils.combiners.perceptron import Layers
from utils.combiners.stacking_features import KINDS, features
from utils.combiners.stacking_heads import (
    FusedInputs,
    FusedInputsWithEmbeddings,
    GatedMixture,
    LogisticOnFeatures,
    PerceptronOnFeatures,
    TemperedBlend,
)
from utils.numeric.metrics import softmax
from utils.stacking_methods import Calibration

RNG = np.random.default_rng(12)
LOGITS = RNG.normal(size=(3, 20, 4)).astype(np.float32)
TENSOR = torch.from_numpy(LOGITS.transpose(1, 0, 2).copy())


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_logistic_and_perceptron_answer_as_their_models(kind):
    width = features(LOGITS, kind).shape[1]
    logistic = Coefficients(kind, np.abs(draw(3)), draw(width, 4), draw(4))
    layers = Layers(kind, (draw(width, 6), draw(6, 4)), (draw(6), draw(4)))
    modules = [
        (logistic, LogisticOnFeatures(kind, logistic.weights, logistic.matrix, logistic.bias)),
        (layers, PerceptronOnFeatures(kind, layers.matrices, layers.biases)),
    ]
    for model, module in modules:
        np.testing.assert_allclose(module(TENSOR).detach().numpy(), model.predict_proba(LOGITS), atol=1e-5)


def test_a_gated_mixture_answers_as_its_gate():
    gate = AttentionGate((draw(12, 5), draw(5, 3)), (draw(5), draw(3)))
    found = GatedMixture(gate.matrices, gate.biases)(TENSOR).numpy()
    np.testing.assert_allclose(found, gate.predict_proba(LOGITS), atol=1e-5)


def test_a_blend_is_the_tempered_learner_and_the_plain_mean():
    mean = softmax(LOGITS).mean(axis=0)
    found = TemperedBlend(MeanOfProbabilities(), 2.0, 0.25)(TENSOR).numpy()
    np.testing.assert_allclose(found, 0.25 * softmax(np.log(mean) / 2) + 0.75 * mean, atol=1e-6)


def test_inputs_of_a_fuser_get_their_members_and_embeddings():
    class ReadsEmbeddings(nn.Module):
        def forward(self, logits, embeddings):
            return torch.softmax(embeddings[0], dim=1)

    fuser = MeanOfProbabilities()
    indices = [np.array([0, 2]), np.array([1])]
    plain = FusedInputs([MeanOfProbabilities(), MeanOfProbabilities()], indices, fuser)(TENSOR).numpy()
    expected = (softmax(LOGITS[[0, 2]]).mean(axis=0) + softmax(LOGITS[1])) / 2
    np.testing.assert_allclose(plain, expected, atol=1e-6)
    embeddings = [torch.from_numpy(draw(20, 4)) for _ in range(3)]
    fused = FusedInputsWithEmbeddings([MeanOfProbabilities(), ReadsEmbeddings()], indices, fuser, [False, True])
    expected = (softmax(LOGITS[[0, 2]]).mean(axis=0) + softmax(embeddings[1].numpy())) / 2
    np.testing.assert_allclose(fused(TENSOR, embeddings).numpy(), expected, atol=1e-6)


def test_learner_and_mean_have_temperatures_of_their_own():
    calibration = Calibration(0.5, 0.3, 2.0)
    module = TemperedBlend(MeanOfProbabilities(), *astuple(calibration))
    mean = softmax(LOGITS).mean(axis=0)
    np.testing.assert_allclose(module(TENSOR).numpy(), calibration.apply(mean, mean), atol=1e-6)
    unscaled = TemperedBlend(MeanOfProbabilities(), 0.5, 0.3)
    assert np.abs((module(TENSOR) - unscaled(TENSOR)).numpy()).max() > 0.01
