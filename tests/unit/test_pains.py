"""What users of RLHF libraries suffer from, and the tests that keep it away from here.

Most of these failures are silent: the run goes on and its result is wrong. Each line says what
would be seen, and names the tests in which it is.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

PAINS = {
    "1 a head is lost or drawn anew on loading": """
        test_loading.py::test_a_missing_value_head_is_refused_unless_it_may_be_new
        test_loading.py::test_a_missing_classifier_is_refused_unless_it_may_be_new
        test_loading.py::test_a_new_head_excuses_no_missing_trunk
        test_loading.py::test_a_new_head_is_told_and_drawn_by_the_seed
        test_loading.py::test_values_of_a_checkpoint_of_trl
        test_saved_models.py::test_a_policy_comes_back_to_the_bit
        test_saved_models.py::test_a_reward_model_comes_back_to_the_bit
        test_lora.py::test_plain_peft_reads_the_adapter_of_a_reward_model_with_its_head""",
    "2 the KL is negative, because what is sampled is not what is scored": """
        test_sampling.py::test_frequencies_are_the_exact_probabilities
        test_sampling.py::test_log_probabilities_of_the_policy_are_those_of_its_samples
        test_rollout.py::test_collect_of_the_reference_itself_has_no_kl
        test_preflight.py::test_a_reference_of_other_weights_in_ppo""",
    "3 pad equals EOS, and EOS is never learned": """
        test_data.py::test_pad_equal_to_eos_changes_nothing
        test_codec.py::test_a_long_response_loses_its_end_and_keeps_eos
        test_invariance.py::test_eos_is_as_good_a_pad_as_any
        test_encoding_report.py::test_supervised_eos_is_measured
        test_preflight.py::test_eos_that_no_row_has""",
    "4 the score lands beside the last token, a penalty on the wrong rows": """
        test_kl.py::test_shape_rewards_closed
        test_ppo.py::test_score_clip_and_eos_penalty
        test_grpo.py::test_scores_are_clipped_and_then_charged_for_a_missing_eos
        test_rollout.py::test_ended_says_which_rows_end_in_eos""",
    "5 accumulation changes the gradient": """
        test_invariance.py::test_micro_batches_of_every_size_give_the_gradient_of_the_whole
        test_ppo.py::test_micro_batches_leave_the_gradient_as_it_is
        test_grpo.py::test_micro_batches_leave_the_gradient_as_it_is
        test_kto.py::test_micro_batches_leave_the_kl_and_the_gradient_as_they_are""",
    "6 which KL estimate, and where it is biased": """
        test_kl.py::test_kl_estimate_definition_gaussian
        test_kl.py::test_kl_estimate_definition_expectation
        test_oracle.py::test_the_expected_update_is_the_gradient_of_the_objective
        test_kto.py::test_no_prompt_meets_a_response_of_its_own""",
    "7 the reward model reads the policy's token ids": """
        test_rollout.py::test_rewards_see_the_rows_own_text_and_plain_responses
        test_rollout.py::test_the_same_text_typed_in_gets_the_same_scores""",
    "8 the prompt of a transcript is cut out wrongly": """
        test_formats.py::test_implicit_prompt
        test_formats.py::test_implicit_prompt_is_dropped
        parity/test_data_1_12.py""",
    "9 dropout is on while scoring": """
        test_ppo.py::test_dropout_is_off
        test_grpo.py::test_dropout_is_off
        test_dpo.py::test_dropout_is_off
        test_kto.py::test_dropout_is_off
        test_policy.py::test_without_dropout_train_mode_is_eval_mode
        test_preflight.py::test_dropout_left_on""",
    "10 truncation takes the response away": """
        test_codec.py::test_a_long_prompt_loses_its_beginning
        test_codec.py::test_encode_preferences_shares_the_prompt_and_drops_what_the_cut_made_equal
        test_encoding_report.py::test_many_cut_responses_are_a_warning
        test_preflight.py::test_rows_without_a_token""",
    "11 the logits of a whole batch fill the memory": """
        test_logprobs.py::test_lm_head_logprobs_definition
        test_logprobs.py::test_lm_head_logprobs_property_memory""",
    "12 the PPO that one knew is gone": """
        parity/test_tables_of_readme.py::test_every_field_of_both_configs_is_told_with_its_default
        parity/test_tables_of_readme.py::test_every_metric_of_both_trainers_is_told
        parity/test_ppo_0_11.py::test_a_run_ends_at_the_weights_and_statistics_of_trl""",
    "13 padding on the left shifts the positions": """
        test_policy.py::test_a_row_alone_is_the_row_in_a_batch
        test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand
        test_preflight.py::test_positions_counted_from_padding_on_the_left""",
    "14 the reward model does not learn, and nothing says why": """
        test_reward.py::test_a_small_model_ranks_32_pairs_right
        test_reward.py::test_length_rules_by_hand
        test_evaluation.py::test_proportion_estimate_closed
        test_reward.py::test_pairs_that_are_the_same_tokens_are_left_out_and_counted
        test_preflight.py::test_a_classifier_that_cannot_learn""",
    "15 BLEU and ROUGE are other numbers elsewhere": """
        test_evaluation.py::test_bleu_sacrebleu
        test_evaluation.py::test_rouge_direct
        test_evaluation.py::test_signatures""",
    "16 the reference is not what training starts from": """
        test_preflight.py::test_a_reference_of_other_weights_in_dpo
        test_policy.py::test_the_reference_is_frozen_and_stays_what_it_was
        test_lora.py::test_after_an_sft_the_reference_of_dpo_is_the_sft_model""",
    "17 half precision gives NaN": """
        test_precision.py::test_bfloat16_is_near_float32_and_leaves_weights_and_losses_in_it
        test_precision.py::test_half_precision_is_only_how_the_inputs_are_stored
        test_optim.py::test_fp16_scales_the_loss_and_skips_an_overflow
        test_optim.py::test_a_gradient_that_is_not_finite_raises_before_the_step""",
    "18 padding leaks into advantages, means and KL": """
        test_advantages.py::test_gae_closed_value_after_the_end
        test_masking.py::test_masking_property_padding
        test_ppo.py::test_report_never_looks_at_padding""",
    "19 longer is better": """
        test_reward.py::test_length_rules_by_hand
        test_ppo.py::test_report_by_hand""",
    "20 tokens merge between prompt and response": """
        test_codec.py::test_encode_demonstrations
        test_data.py::test_collate_as_drawn""",
    "21 two BOS tokens": """
        test_codec.py::test_bos_of_a_chat_template_is_the_only_one_and_survives_the_cut
        test_codec.py::test_one_bos_where_the_tokenizer_starts_with_it""",
    "22 the loss of DPO stays where it was": """
        test_preference_losses.py::test_dpo_loss_closed_equality
        test_preflight.py::test_the_first_loss_of_dpo_is_ln_2_with_label_smoothing
        test_preflight.py::test_rows_without_a_token
        test_dpo.py::test_training_prefers_what_was_chosen""",
    "23 a run cannot go on where it stopped": """
        test_ppo.py::test_resume
        test_grpo.py::test_resume
        test_dpo.py::test_resume
        test_kto.py::test_resume
        test_reward.py::test_resume
        test_sft.py::test_resume
        test_lora_runs.py::test_each_algorithm_resumes_to_the_bit""",
    "24 a response template is not found": """
        test_data.py::test_collate_masks_do_not_look_at_ids
        test_preflight.py::test_rows_without_a_token""",
    "25 the ratio jumps, and minibatches are skipped": """
        test_losses.py::test_ppo_policy_loss_closed_largest_ratio
        test_ppo.py::test_stop_kl_ends_the_update""",
    "26 the chosen response becomes less likely too": """
        test_dpo.py::test_training_is_the_plain_loop""",
    "27 nobody knows what a metric means": """
        parity/test_tables_of_readme.py::test_every_metric_of_both_trainers_is_told
        test_ppo.py::test_report_by_hand""",
    "28 a function of one's own is no reward": """
        test_rewards.py::test_a_weighted_sum_of_functions_and_a_model
        test_rollout.py::test_columns_go_to_those_who_name_them
        test_rewards.py::test_nan_names_the_function_and_the_prompt""",
    "29 the file has other columns": """
        test_datafile.py::test_formats_read_the_same_rows
        test_datafile.py::test_named_columns_go_before_all_names
        test_datafile.py::test_file_is_refused
        test_datafile.py::test_another_label_refuses_the_file_and_names_row_and_value
        test_formats.py::test_messages""",
    "30 the reference is scored again and again": """
        test_dpo.py::test_cached_and_live_reference_are_the_same
        test_dpo.py::test_cache_holds_the_logprobs_of_each_pair_in_its_place
        test_kto.py::test_cached_and_live_reference_are_the_same""",
}


@cache
def names_in(file: str) -> set[str]:
    source = ast.parse(next(TESTS.rglob(file)).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(source) if isinstance(node, ast.FunctionDef)}


def test_all_thirty_are_here():
    assert [int(pain.split()[0]) for pain in PAINS] == list(range(1, 31))


@pytest.mark.parametrize("pain", PAINS)
def test_the_tests_exist(pain):
    for node in PAINS[pain].split():
        file, _, name = node.partition("::")
        assert name in names_in(file) | {""}
