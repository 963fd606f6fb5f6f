"""Four CPU devices, strict numerics, and compiled things shared by the whole session."""

import gc
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

DEVICES = "--xla_force_host_platform_device_count"
# Most of the time goes into compiling programs that then run for milliseconds, so XLA compiles them without optimizing.
# The last flag chooses the older, faster emitters where XLA still has them (JAX 0.10); later versions do not read it.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:  # `=3` compiles as users do
    flags += f" {QUICK}"
COMPILER_FLAGS = " ".join(flag for flag in flags.split() if DEVICES not in flag)
if DEVICES not in flags:  # a process of a test says how many itself
    flags += f" {DEVICES}=4"
os.environ["XLA_FLAGS"] = flags

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A script's background ignores Ctrl-C, and so would every program that a test starts there to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
STARTED = time.monotonic()
TEMPORARY: list[str] = []  # the temporary folder of this run, which goes with it


def xla_flags(devices):
    """XLA_FLAGS of a process that has so many CPU devices, and compiles as this one does."""
    return f"{COMPILER_FLAGS} {DEVICES}={devices}"


QUIET = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


# The files that take longest, longest first: a long file that starts last keeps one process waiting for the other.
LONGEST = (
    *("cli_resume", "models", "step", "multidevice", "cli_refusals", "golden", "lora", "sampling"),
    *("functional", "loss_signals", "loss_names", "images_model", "attention", "flash", "diffusion", "ppo"),
    *("training", "config", "routing", "online_rounds", "pods", "chat_runs", "cli_runs", "context"),
    *("reward_model", "model_check", "refresh", "emitted", "check", "row_kinds", "win_rates", "theory"),
    *("report", "sampling_lanes", "groups", "expert_mesh", "image_runs", "implicit_rewards", "control", "checkpoint"),
    *("judge", "interrupts", "lora_runs", "bench", "notebook", "hosts", "faults", "cli_frontier"),
)


def pytest_configure(config):
    gc.set_threshold(50_000, 20, 20)  # tracing makes many objects: a sixth of its time would go into looking for garbage
    if not hasattr(config, "workerinput"):  # processes of xdist, and those that tests start, inherit it
        TEMPORARY.append(tempfile.mkdtemp(prefix="dpo-", dir=_in_memory()))
        os.environ["TMPDIR"], tempfile.tempdir = TEMPORARY[0], None


def _in_memory():
    """A folder of memory with room for the tests' files, most of which are synced to disk; None if there is none."""
    try:
        room = shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
    return "/dev/shm" if room > 4e9 and os.access("/dev/shm", os.W_OK | os.X_OK) else None


def pytest_sessionfinish(exitstatus):
    if exitstatus != pytest.ExitCode.OK:
        TEMPORARY.clear()  # what failed can be looked at


def pytest_unconfigure():
    for folder in TEMPORARY:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--within", type=float, help="skip what has not begun after so many seconds")
    parser.addoption("--as-given", action="store_true", help="files in the order given, not the longest first")


def pytest_runtest_setup(item):
    within = item.config.getoption("--within")
    if within is not None and time.monotonic() - STARTED > within:
        pytest.skip("no time left")


# Left out by default, so that the tests take minutes: whole processes, kills, and further combinations of what a default test
# checks in one of them. `.ci/run` runs all. By file: the beginnings of their names.
LONG = {
    "attention": (
        "test_rows_and_heads_over_a_mesh[chunked",
        "test_path_equals_dense[splash-plain]",
        "test_path_equals_dense[splash-plain, window]",
        "test_path_equals_dense[splash-packed]",
        "test_path_equals_dense[splash-shared, window]",
        "test_path_equals_dense[flash-plain]",
        "test_path_equals_dense[flash-plain, window]",
        "test_path_equals_dense[flash-packed]",
        "test_path_equals_dense[flash-shared, window]",
        *(
            f"test_path_equals_dense[{path}-{case}]"
            for path in ("blocks", "chunked")
            for case in ("plain, window", "shared", "packed")
        ),
        "test_path_equals_dense[cudnn-plain]",
        "test_path_equals_dense[cudnn-plain, window]",
        "test_path_equals_dense[cudnn-packed]",
        "test_path_equals_dense[cudnn-shared, window]",
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
    "images_model": ("test_what_is_sampled", "test_devices_take_the_same_step"),
    "context": (
        "test_memory_does_not_grow",
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
        *(f"test_families_equal_dense_on_plain_rows[{family}" for family in ("gemma3", "gpt", "llama")),
        *(f"test_float32_equals_dense[{case}" for case in ("64", "96", "128", "20")),
        *(f"test_bfloat16_is_as_close_to_float32_as_dense_bfloat16[{case}" for case in ("64", "80", "128", "256", "20")),
    ),
    "frontier": ("test_kl_depends_neither",),
    "functional": ("test_the_example_of_a_public_name_does_what_it_shows[train]",),
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
        *("test_devices_do_not_matter[fsdp 2 x tensor 2-last", "test_devices_do_not_matter"),
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
        *(
            f"test_a_loss_across_pairs_is_that_of_the_whole_batch_where_it_is_cut[{case}"
            for case in (
                *("4 microbatches-custom-packed", "4 microbatches-custom-shared", "4 devices-aot", "4 devices-custom-plain"),
                *("4 devices-custom-shared", "2 devices 2 microbatches-custom-p", "2 mesh 2 microbatches-aot"),
                *("2 mesh 2 microbatches-custom-plain", "2 mesh 2 microbatches-custom-shared"),
            )
        ),
    ),
    "audit": ("test_truncation_is_told_by_the_audit_and_by_training",),
    "losses": ("test_plackett_luce_of_two_is_dpo_bit_for_bit[float32",),
    "models": (
        *(
            f"test_prefill_and_single_tokens_equal_forward[{case}-apart"
            for case in (
                "gpt_neox",
                "gpt_neox_sequential",
                "gptj",
                "llama",
                "llama_biased",
                "mistral",
                "olmo2",
                "olmoe",
                "qwen2",
                "qwen3",
                "smollm3",
            )
        ),
        *(
            f"test_prefill_and_single_tokens_equal_forward[{case}-stacked"
            for case in ("gemma2", "gemma3_text", "mixtral", "phi3", "qwen3_moe")
        ),
        *(
            f"test_every_setting_changes_the_result[{case}"
            for case in (
                *("gpt2-", "gptj-", "llama-norm_eps", "qwen2-", "gemma2-logit_softcap", "gemma2-embedding_scale"),
                *("gemma2-norm", "gemma3_text-"),
            )
        ),
        "test_shared_and_packed_rows_equal_plain_rows[llama]",
        *(
            f"test_shared_and_packed_rows_equal_plain_rows[{case}"
            for case in ("gemma2", "olmo", "smollm3", "phi3", "mixtral", "gpt_neox", "llama_biased", "mistral", "gptj", "qwen")
        ),
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
        *(
            f"test_completions_do_not_depend_on_devices_and_batches[{way}"
            for way in ("fsdp 4", "data 4", "a model without", "data 2 x fsdp 2 reversed")
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
    "win_rates": ("test_exact_coverage_is_never_low_where_two_or_more_pairs_are_unlike_the_rest[60",),
    "cpl": ("test_cpl_learns_from_images",),
}
APART = {"soak", "parity", "plan", "browser", "writers"}
"""Marks of tests that run only where they are asked for: these are not long as well."""


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    mark_long(items, whole=not any("::" in argument for argument in config.args))
    if config.getoption("--as-given"):
        return
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def mark_long(items, *, whole):
    """Marks the tests of `LONG`. Where `whole` files were collected, a beginning that no name has is an error."""
    files = {}
    for item in items:
        files.setdefault(item.path.stem.removeprefix("test_"), []).append(item)
    for name in files.keys() & LONG.keys():
        for beginning in LONG[name]:
            found = [item for item in files[name] if item.name.startswith(beginning)]
            if whole and not found:
                raise pytest.UsageError(f"tests/conftest.py: LONG: test_{name}.py has no {beginning}")
            for item in found:
                if not APART & {mark.name for mark in item.iter_markers()}:
                    item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer the golden numbers were made with: byte-level BPE, 511 entries, eos = bos = 0, no pad token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window, for the tests that `-m browser` chooses."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    assert path, "these tests drive a Chromium that is installed: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()
