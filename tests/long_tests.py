"""Tests left out by default, so that the tests take minutes. `.ci/run` runs all.

They are whole processes, kills, and further combinations of what a default test checks in one of them. By file: the beginnings
of their names. A tuple is a beginning and the endings of the names that are run by default all the same.
"""

LONG = {
    "attention": (
        "test_rows_and_heads_over_a_mesh[chunked",
        (
            "test_path_equals_dense",
            *("[splash-packed, window]", "[flash-packed, window]", "[blocks-shared, window]", "[chunked-packed, window]"),
        ),
        "test_rows_over_pmap[splash",
        "test_rows_and_heads_over_a_mesh[flash",
        "test_rows_and_heads_over_a_mesh[splash",
        "test_a_decoder_on_packed_rows_equals_the_dense_one",
    ),
    "bench": (
        *("test_all_rungs", "test_rungs_remove", "test_gates_catch", "test_a_profile_says", "test_exponents"),
        "test_the_command_leaves",
    ),
    "calibration": (
        "test_correlations_that_were_planted",
        "test_calibration_error_that_was_planted_is_found[1.0",
        "test_calibration_error_that_was_planted_is_found[2.5",
    ),
    "check": (
        "test_plain_files_need_no_tensorflow_datasets[audit",
        "test_plain_files_need_no_tensorflow_datasets[prepare",
        "test_rows_pass_here",
        "test_the_bench_times_a_step",
    ),
    "checkpoint": ("test_a_big_file_is_not_read_again", "test_damage_to_any_file_of_a_step_is_found[1"),
    "cli_frontier": ("test_",),
    "cli_dialogue": ("test_dialogue",),
    "cli_robust": ("test_noise", "test_shift", "test_overoptimization"),
    "cli_diffusion": ("test_digits",),
    "image_runs": (
        "test_preferences_are_enough",
        *(
            "test_bad_images",
            "test_a_run_starts",
            "test_the_encoder_is_exported",
            "test_prompts_with_images",
            "test_prompts_of",
        ),
        *(
            "test_a_killed_run",
            "test_an_image_that_changes",
            "test_however_it_is_run",
            "test_a_policy_is",
            "test_an_adapter",
            "test_sft_scores",
        ),
        *("test_the_report", "test_a_model_without", "test_what_does_not_fit", "test_texts_alone"),
        *(
            f"test_commands_for_texts_refuse_the_first_image[{name}"
            for name in ("ppo", "online", "frontier", "label", "reward")
        ),
    ),
    "images_model": (
        *("test_what_is_sampled", "test_devices_take_the_same_step"),
        (
            "test_attention_sees_images_as_dense_does",
            *(f"[{case}]" for case in ("blocks-shared-None", "flash-shared-7", "splash-packed-25")),
        ),
    ),
    "context": (
        *(
            "test_memory_does_not_grow",
            "test_a_row_is_cut_in_pieces_and_put_together_again[3",
            "test_a_row_is_cut_in_pieces_and_put_together_again[4",
        ),
        "test_the_kernels_go_round_as_well",
        "test_a_run_is_that_of_one_device",
        *(f"test_log_probabilities_and_gradients_are_those_of_one_device[{case}" for case in ("llama", "gpt2", "mixtral")),
        "test_log_probabilities_and_gradients_are_those_of_one_device[gemma2-odd",
    ),
    "cli_scenes": ("test_scenes",),
    "control": (
        "test_cpl_on_preferences_by_exact_regret",
        "test_the_command",
    ),
    "diffusion": (
        *("test_the_loss_is_the_papers_in_float64[elbo", "test_devices_and_microbatches_change_nothing"),
        *("test_training_ends", "test_with_eight_draws", "test_the_bound_of_many_draws"),
    ),
    "cli_refusals": tuple(
        f"test_bad_data_are_refused_by_file_and_line_or_dropped_and_counted[{n}" for n in ("changes0", "changes2")
    ),
    "cli_resume": (
        "test_checkpoints_of_which_none_verifies",
        "test_sigterm_saves",
        "test_a_longer_run_continues",
        "test_a_run_resumed_from_the_middle_equals_the_uninterrupted_one[damaged",
        *("test_four_devices_give", "test_a_run_continues_on_another_mesh", "test_a_second_round", "test_checkpoints_may_lie"),
        *("test_a_warm_up_longer", "test_held_out_pairs_may_change"),
    ),
    "cli_runs": (
        "test_a_reward_model_has_the_wanted_type",
        *("test_a_sum_of_losses", "test_a_run_in_bfloat16"),
        "test_several_temperatures",
        "test_a_run_in_steps_that_keeps",
    ),
    "emitted": ("test_what_a_policy_samples_is_judged",),
    "expert_mesh": (
        "test_rows_in_pieces_route",
        *("test_steps_are_those_of_one_device", "test_log_probabilities_and_gradients", "test_microbatches_on_a_mesh"),
        *("test_a_run_continues_on_another_mesh", "test_an_adapter_beside_experts", "test_the_program_trains_experts"),
    ),
    "expert_bench": ("test_a_line_for_each_mixture",),
    "faults": (
        "test_kill_9_at_random_times[1",
        "test_sigterm_saves",
        "test_a_second_sigterm",
        "test_a_host_that_is_killed",
        "test_a_full_disk_ends",
    ),
    "flash": (
        "test_the_kernels_visit_the_blocks_in_which_somebody_sees_something[None",
        ("test_tiles_change_nothing_but_the_order_of_sums", "[tiles0]"),
        *(f"test_families_equal_dense_on_plain_rows[{family}" for family in ("gemma3", "gpt", "llama")),
        ("test_float32_equals_dense", "[256, window, soft cap]"),
        *(f"test_bfloat16_is_as_close_to_float32_as_dense_bfloat16[{case}" for case in ("64", "80", "128", "256", "20")),
    ),
    "frontier": ("test_kl_depends_neither",),
    "functional": tuple(
        f"test_the_example_of_a_public_name_does_what_it_shows[{name}]"
        for name in ("train", "lora_model", "Checkpoints", "collect")
    ),
    "grouped_product": (("test_each_row_meets_the_matrix_of_its_group", "[mixed]", "[none first]"),),
    "fuzz_judge": ("test_every_verdict_of_a_damaged_log",),
    "fuzz_runs": ("test_a_report_always_writes",),
    "golden": (
        "test_dpo_trajectory[gpt_neox-shared]",
        *(f"test_dpo_trajectory[{case}]" for case in ("gpt2-shared", "gpt2-packed", "gpt_neox-plain", "gpt_neox-packed")),
        *(f"test_dpo_trajectory_on_four_devices[{case}" for case in ("gpt2", "gpt_neox-fsdp2 x tensor2", "gpt_neox-pmap4")),
        *(f"test_sft_trajectory[{case}" for case in ("gpt2", "gpt_neox-1")),
    ),
    "groups": (
        "test_the_reward_model_learns_the_same",
        "test_a_step_on_groups_is_that_on_pairs[pmap",
    ),
    "hosts": ("test_several_processes_take", "test_a_signal_to_one_process", "test_an_error_of_one_host"),
    "hosts_lab": ("test_ppo_on_two", "test_a_frontier_on_two", "test_online_on_two", "test_labels_a_learned_reward"),
    "implicit_rewards": (
        "test_rewardbench_is_read_as_it_is",
        "test_swapped_sides",
    ),
    "interrupts": (
        *("test_a_signal_outside_of_training", "test_an_interrupted_program_that_does_not_return"),
        "test_a_reader_who_goes_away_does_not_end_the_work[False",
    ),
    "judge": ("test_a_thousand_pairs_through_faults[True",),
    "judge_program": ("test_a_kill_costs_no_second_question",),
    "lora": (
        *(
            "test_devices_do_not_matter",
            "test_decoding_equals_the_forward_pass[last layer",
            "test_gradients_of_a_part_are_those_of_the_whole[layers",
        ),
        *("test_gradients_of_an_adapter_follow_from_those_of_the_weights[gpt2", "test_an_adapter_survives_its_files[gpt"),
        "test_an_adapter_survives_its_files[phi3",
    ),
    "lora_runs": (
        *("test_eval_sample_and_export", "test_an_interrupted_run_ends_exactly"),
        "test_only_the_last_layer",
        "test_an_adapter_is_trained_further",
        "test_a_reference_moves_to_base_and_adapter",
        "test_a_reward_model_of_a_part",
    ),
    "loss_signals": (
        "test_a_likelihood_term_per_token_does_not_depend_on_how_the_batch_is_cut[microbatches",
        (
            "test_a_loss_across_pairs_is_that_of_the_whole_batch_where_it_is_cut",
            *("[4 microbatches-aot-packed]", "[4 devices-custom-packed]", "[2 mesh 2 microbatches-custom-packed]"),
        ),
        ("test_lengths_are_those_of_real_pairs", "[lengths-packed]", "[mean_lengths-packed]"),
    ),
    "audit": ("test_truncation_is_told_by_the_audit_and_by_training",),
    "losses": ("test_plackett_luce_of_two_is_dpo_bit_for_bit[float32",),
    "models": (
        (
            "test_prefill_and_single_tokens_equal_forward",
            *("[gpt_neox-stacked]", "[llama-stacked]", "[gpt2-apart]", "[gemma3_text-apart]", "[qwen3_moe-apart]"),
        ),
        *(
            f"test_every_setting_changes_the_result[{case}"
            for case in (
                *("gpt2-", "gptj-", "llama-norm_eps", "qwen2-", "gemma2-logit_softcap", "gemma2-embedding_scale"),
                *("gemma2-norm", "gemma3_text-"),
            )
        ),
        ("test_shared_and_packed_rows_equal_plain_rows", "[gemma3_text]", "[gpt2]"),
        "test_kernels_are_rounded_once_without_remat[gemma3",
    ),
    "multidevice": (
        "test_every_way_to_run[data 2 x fsdp 2 reversed",
        "test_microbatches",
        "test_what_a_mesh_cuts_apart_is_computed_as_a_whole",
        "test_microbatches_on_a_mesh",
        "test_shard_map",
        *(
            f"{test}[{way}"
            for test in (
                "test_every_way_to_run",
                "test_weights_go_from_their_file_to_their_place",
                "test_the_reference_pass_keeps_the_order",
            )
            for way in ("fsdp 4", "data 4", "a model without")
        ),
        ("test_completions_do_not_depend_on_devices_and_batches", "[fsdp 2 x tensor 2]", "[fsdp 4]"),
        *(f"test_weights_go_from_their_file_to_their_place[{way}" for way in ("one", "data 2")),
        (
            "test_the_lengths_of_axes_are_known_without_the_model",
            *(f"[{family}]" for family in ("gpt2", "gpt_neox", "llama", "gemma3_text", "qwen3_moe")),
        ),
    ),
    "online_program": (
        "test_the_reference_of_a_round_is_the_policy_with_its_adapter",
        "test_rounds_by_a_judge_that_stops",
        "test_rounds_by_an_exact_reward",
    ),
    "ppo_resume": tuple(f"test_a_killed_run_ends_with_the_same_bits[{way}" for way in ("pmap", "mesh")),
    "nodes": ("test_two_processes_find_each_other",),
    "notebook": ("test_",),
    "odd_files": ("test_few_rows_are_unpacked",),
    "online_rounds": (
        *("test_a_run_that_was_killed_again_and_again_ends_in_the_same_bits[1", "test_devices_do_not_matter"),
        *("test_labels_are_spent_on_the_prompts_that_are_chosen[disagreement", "test_a_run_that_reads_earlier_rounds_ends"),
    ),
    "optimizers": ("test_on_a_mesh_it_is_the_same",),
    "pipeline": ("test_what_was_asked_differently",),
    "plan": ("test_microbatches_take_less_memory", "test_a_step_planned_on_a_mesh"),
    "plots": (
        "test_no_name_of_a_curve",
        "test_a_dpo_run_has_every_panel",
    ),
    "pod_faults": ("test_a_run_that_lost_a_host_starts_again_on_the_same_slice[9",),
    "pods": (
        "test_a_worker_that_does_not_answer_may_be_the_one_that_failed[999",
        "test_a_preempted_slice_is_asked_for_again_and_the_run_continues[notice",
        "test_a_preempted_slice_is_asked_for_again_and_the_run_continues[env",
        "test_the_same_line_comes_back",
        "test_shellcheck",
    ),
    "ppo": (
        "test_the_adaptive_coefficient",
        "test_what_is_collected_is_what_the_sampler_drew",
        "test_collecting_does_not_depend_on_devices[pmap",
    ),
    "report": (
        "test_the_base_model_scored_by_mistake",
        "test_fine_is_said_of_what",
        "test_several_runs_stand",
    ),
    "reward_model": (
        "test_however_it_is_run_it_is_one_step[pmap",
        "test_a_run_that_was_killed",
    ),
    "rounding": ("test_it_is_the_same_on_one_device",),
    "routing": (
        *("test_the_loss_is_of_the_batch_on_all_devices", "test_microbatches_take_the_mean_of_theirs", "test_a_step_balances"),
        *("test_the_model_that_tells_its_routing", "test_what_a_router_that_prefers_nobody"),
    ),
    "row_kind_runs": ("test_plackett_luce", "test_kto_from_audit"),
    "sampling": (
        "test_logps_are_those_of_the_forward_pass[gemma3",
        "test_greedy_is_argmax_of_the_forward_pass[gemma3",
        "test_lengths_and_keys_are_those",
        "test_weights_are_rounded_before_the_loop_over_tokens_and_not_for_each_token[mixtral",
        "test_weights_are_rounded_before_the_loop_over_tokens_and_not_for_each_token[gemma2",
    ),
    "sampling_lanes": (
        *tuple(f"test_completions_that_share_a_prompt_are_those_that_do_not[{case}" for case in ("adapter", "windows")),
        "test_completions_that_share_a_prompt_are_those_that_do_not[grouped",
    ),
    "sampling_race": ("test_our_greedy",),
    "scorer": tuple(f"test_what_is_written_scores_alike_when_read[{family}" for family in ("qwen3", "gpt_neox", "gpt2")),
    "step": (
        "test_partitioners_agree[pmap",
        "test_shard_map_agrees[checked-1",
        "test_shard_map_agrees[unchecked",
        "test_layouts_and_microbatches_agree[shared-1",
        "test_a_sharded_batch_under_jit_agrees",
        "test_token_accuracy_is_the_share_of_most_likely_tokens[1",
        "test_chunks_without_a_used_position",
        "test_a_step_on_rankings_of_two",
    ),
    "theory": (
        "test_a_function_of_the_prompt_changes",
        *("test_dpo_converges_to_the_optimum[reference", "test_ipo_goes", "test_plackett_luce_of_four", "test_unlikelihood"),
        "test_the_implicit_reward_is_the_true_one_up_to_a_function_of_the_prompt[reference",
    ),
    "training": ("test_it_is_twenty_lines",),
    "training_samples": ("test_samples_at_each_evaluation",),
    "dialogue": ("test_a_policy_is_enumerated",),
    "chat_runs": ("test_ppo_stops_there_too",),
    "bench_updates": ("test_norms_are_those_of_all_parameters[gpt_neox",),
    "robust": tuple(f"test_the_policy_of_least_expected_loss_is_the_one_that_theory_names[{loss}]" for loss in ("dpo", "cdpo")),
    "refresh": tuple(f"test_a_run_killed_before_any_step_ends_with_the_same_bits[{step}" for step in (2, 7)),
    "stopping": (("test_a_killed_run_stops_where_it_would_have", "[1]", "[5]", "[8]"),),
    "row_kinds": ("test_losses_of_single_completions_do_not_depend_on_the_parts_of_a_batch[apo",),
    "win_rates": (
        ("test_length_control_recovers_what_a_judge_that_likes_length_hides", "[256-0.61-3.0]"),
        "test_exact_coverage_is_never_low_where_two_or_more_pairs_are_unlike_the_rest[60",
    ),
    "cpl": ("test_cpl_learns_from_images",),
}
