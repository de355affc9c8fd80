"""Bugs that other frameworks for supervised fine-tuning have shipped, and the tests that keep them out of this one.

T1   mean of means under accumulation
       training/test_step.py::test_a_short_last_batch_divides_by_its_own_counts
       pipeline/test_ntp_equality.py::test_trl_sft_trainer_is_ours
T2   normalisation across ranks
       distributed/test_sharding.py::test_gradients_of_two_ranks_are_the_formulas
       training/test_step.py::test_a_global_batch_cut_up_is_the_formula
T3   two BOS tokens
       text/test_encoders.py::test_one_bos_in_training_and_chat
T4   pad equal to eos is masked
       text/test_masks.py::test_pad_equal_to_eos_is_still_trained
T5   stop token outside the mask
       text/test_encoders.py::test_end_of_turn_of_real_tokenizers
       text/test_masks.py::test_every_tokenizer_trains_the_response_and_its_end
T6   generation tags
       text/test_masks.py::test_every_tokenizer_trains_the_response_and_its_end
T7   the prompt is no prefix
       text/test_masks.py::test_a_template_that_rewrites_turns_is_split
T8   spans found by string search
       text/test_masks.py::test_any_text
       text/test_masks.py::test_a_token_across_the_boundary_is_cut_apart
T9   labels shifted twice
       pipeline/test_ntp_equality.py::test_transformers_loss_is_ours
       training/test_step.py::test_a_global_batch_cut_up_is_the_formula
T10  no label left after truncation
       data/test_dataset.py::test_rows_without_response_tokens_are_dropped_counted_and_named
       training/test_scoring.py::test_a_broken_model_is_not_scored
T11  an empty batch on one rank
       distributed/test_sharding.py::test_gradients_of_two_ranks_are_the_formulas
       training/test_step.py::test_ranks_without_work_get_a_filler_without_weight
       functional/test_functional.py::test_empty_and_tiny_inputs_keep_the_graph
T12  leaks between packed sequences
       model/test_packing.py::test_packed_documents_have_the_states_and_gradients_they_have_alone
       model/test_packing.py::test_models_that_let_documents_leak_are_refused
       training/test_padding_free.py::test_one_row_is_one_by_one
T13  resume
       distributed/test_equivalence.py::test_a_run_continued_after_kill_is_the_uninterrupted_run
T14  streaming (of a Trainer's rows; data.train has no way to stream)
       tools/integrations/test_trainers.py::test_it_needs_a_split_and_rows_by_number
T15  a checkpoint of one rank's shard
       training/test_checkpoint.py::test_two_fsdp_ranks_to_one_and_back
T16  tied embeddings
       distributed/test_sharding.py::test_gradients_of_two_ranks_are_the_formulas
       training/test_checkpoint.py::test_two_fsdp_ranks_to_one_and_back
       model/test_models.py::test_tied_weights_are_stored_once
T17  the wrapper's forward is skipped
       distributed/test_sharding.py::test_gradients_of_two_ranks_are_the_formulas
T18  no_sync that does nothing
       distributed/test_sharding.py::test_ddp_reduces_on_the_last_accumulation_step_only
       distributed/test_sharding.py::test_the_head_is_gathered_once_a_micro_batch_and_reduced_once_a_step
T19  bfloat16 master weights
       pipeline/test_recipe.py::test_a_model_stored_in_bfloat16_is_exported_in_bfloat16_and_trained_in_float32
T20  dtype and stop ids of the export
       pipeline/test_recipe.py::test_the_exported_model_loads_and_generates
       model/test_models.py::test_every_stop_id_is_written
T21  vocabulary resized
       model/test_models.py::test_vocabulary_is_never_resized
T22  adapters with checkpointing
       model/test_adapters.py::test_recomputed_activations_change_no_gradient
       config/test_lora.py::test_quantised_shards_are_refused
T23  an option silently ignored
       config/test_config.py::test_a_problem_is_named_with_its_options
       cli/test_refusals.py::test_a_directory_of_other_options_is_refused_at_once
T24  scores joined wrongly
       training/test_scoring.py::test_two_ranks_give_the_table_of_one
       training/test_scoring.py::test_the_sums_are_those_of_the_models_own_logits
T25  a stale cache
       data/test_dataset.py::test_the_fingerprint_follows_what_the_tokens_are_made_from
       pipeline/test_reference.py::test_a_changed_reference_model_is_refused
T26  logits by hand
       model/test_models.py::test_head_fits
T27  perplexity
       pipeline/test_recipe.py::test_confidence_and_split_are_the_papers_formula
       training/test_scoring.py::test_dropout_is_off_while_scoring_and_on_again_after
T28  Mixup alignment
       training/test_step.py::test_a_global_batch_cut_up_is_the_formula
       batches/test_collate.py::test_collate_aligns_nth_response_token_with_nth_response_token
T29  gradients under no_grad
       training/test_scoring.py::test_scoring_does_no_gradient_work
       functional/test_gradients.py::test_nothing_large_is_ever_allocated
T30  an adapter on the head
       model/test_adapters.py::test_the_loss_sees_adapters_on_head_and_embeddings
       model/test_adapters.py::test_what_the_loss_cannot_follow_on_the_head_is_refused
T31  scales of the head
       model/test_models.py::test_unknown_head_is_refused
       model/test_models.py::test_head_fits
T32  a split that flips on rounding
       distributed/test_equivalence.py::test_same_run_computed_in_another_way
T33  weight gradient in bfloat16
       functional/test_functional.py::test_weight_gradient_is_summed_in_float32

"""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = __doc__ or ""


def test_every_trap_is_in_the_table_once():
    assert [int(n) for n in re.findall(r"^T(\d+) ", TABLE, re.MULTILINE)] == list(range(1, 34))


@pytest.mark.parametrize("entry", sorted(set(re.findall(r"\S+\.py::\w+", TABLE))))
def test_the_tests_of_the_table_exist(entry):
    file, name = entry.split("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
