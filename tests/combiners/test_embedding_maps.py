"""Embeddings centred, scaled and reduced."""

from __future__ import annotations

import numpy as np
import pytest

from utils.combiners.embedding_maps import EmbeddingMaps, concatenated, shared_variates


@pytest.fixture(scope="module")
def embeddings():
    rng = np.random.default_rng(4)
    common = rng.normal(size=(80, 2))
    return [
        (common @ rng.normal(size=(2, width)) * 10 + rng.normal(size=(80, width))).astype(np.float32)
        for width in (5, 9)
    ]


def test_blocks_are_centred_with_one_scale_per_member(embeddings):
    blocks = concatenated(embeddings).apply(embeddings)
    for block, embedding in zip(blocks, embeddings, strict=True):
        np.testing.assert_allclose(block.mean(axis=0), 0, atol=1e-5)
        ratio = embedding.std(axis=0) / block.std(axis=0)
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
        assert block.std() == pytest.approx(1, abs=1e-4)


def test_wide_embeddings_are_reduced_within_the_budget(embeddings):
    maps = concatenated(embeddings, budget=8)
    assert maps.widths == (4, 4)
    assert all(0 < kept <= 1 for kept in maps.facts["variance_kept"])


@pytest.mark.parametrize("make", [concatenated, shared_variates])
def test_maps_survive_their_state(make, embeddings):
    maps = make(embeddings)
    again = EmbeddingMaps.from_state(maps.state())
    assert again.widths == maps.widths
    for block, expected in zip(again.apply(embeddings), maps.apply(embeddings), strict=True):
        assert block.tobytes() == expected.tobytes()


@pytest.mark.parametrize("members", [1, 2])
def test_shared_variates_are_summed_over_the_members(members, embeddings):
    maps = shared_variates(embeddings[:members], rank=2)
    (block,) = maps.apply(embeddings[:members])
    assert block.shape == (80, 2)
    assert np.isfinite(block).all()
    assert np.abs(maps.facts["canonical_correlations"]).max() <= 1 + 1e-9
