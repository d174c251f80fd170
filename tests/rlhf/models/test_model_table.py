"""The script that puts every causal class of transformers through the stages still runs."""

import pytest
import torch

from tests.rlhf.helpers.model_table import COLUMNS, as_markdown, try_class
from tests.rlhf.helpers.tiny_models import NOT_BUILT, make_model, model_types


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "qwen3_next"])
def test_a_class_is_built_tiny(model_type):
    model = make_model(model_type, 13)
    logits = model(input_ids=torch.arange(3, 11)[None]).logits
    assert logits.shape == (1, 8, 13) and logits.std() > 0.1
    assert model.num_parameters() < 100_000


def test_a_row_goes_through_all_stages(tmp_path):
    row = try_class("llama", tmp_path)
    assert {row[column] for column in COLUMNS if column != "silent"} == {"yes"}, row


def test_every_class_is_built_or_has_a_reason():
    assert "llama" in model_types()
    assert not set(model_types()) & NOT_BUILT.keys()


def test_faults_that_are_the_same_stand_together():
    rows = [
        {"type": "a", "builds": "yes", "sft": "fault: it broke ¶ it hung"},
        {"type": "b", "builds": "yes", "sft": "fault: it broke", "ppo": "refused: too small"},
    ]
    page = as_markdown(rows)
    assert "- fault · sft · it broke\n  (2) a, b" in page
    assert "- fault · sft · it hung\n  (1) a" in page
    assert "- refused · ppo · too small\n  (1) b" in page
