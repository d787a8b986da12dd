"""The header of a model card, read by the library of the Hugging Face Hub."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from test_custom_format import SCORE, STATUS, description

from utils.exporting import custom_format
from utils.exporting.hub_metadata import METRICS, hub_header


def test_the_hub_reads_every_score_of_a_model_card():
    card = ModelCard(custom_format.model_card("leaf: ensemble", description(), ("a", "b"), STATUS, SCORE))
    assert card.data.model_name == "leaf: ensemble"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {kind: SCORE[key] for key, (kind, _) in METRICS.items()}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert {result.task_type for result in card.data.eval_results} == {"image-classification"}
    assert card.text.lstrip().startswith("# Model card: leaf: ensemble")


@pytest.mark.parametrize("mark", [{"contaminated": True}, {"optimistic": True}, {"unknown_training_data": ["a"]}])
def test_scores_that_may_be_too_high_are_not_in_the_header(mark):
    assert "model-index" in hub_header("it", SCORE)
    assert "model-index" not in hub_header("it", SCORE | mark)
    assert (
        ModelCard(custom_format.model_card("it", description(), ("a",), STATUS, SCORE | mark)).data.eval_results is None
    )


def test_without_scores_the_card_has_a_header_still():
    assert ModelCard(custom_format.model_card("it", description(), ("a",), {}, None)).data.pipeline_tag
