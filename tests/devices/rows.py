"""The rows: what a user of several devices does, and what comes of it."""

from tests.devices.row import Row, Section, both

DDP = "integrations/test_distributed_data_parallel.py::test_"
PEFT = "integrations/test_distributed.py::test_"
SYNCED = "integrations/test_check_synced.py::test_"
WRAPPED = "integrations/test_wrapped_models.py::test_"
FSDP2 = "integrations/test_fsdp2.py::test_"
CONTAINERS = "integrations/test_fsdp2_containers.py::test_"
FOLDED = "integrations/test_folded_on_ranks.py::test_"
RANKS = "integrations/test_sharded_ranks.py::test_"
MEETING = "integrations/test_ranks.py::test_"
TIED = "integrations/test_tied_and_sharded.py::test_"
BASE = "integrations/test_peft_base_distributed.py::test_"
MOVES = "integrations/test_sharded_moves.py::test_"
PARALLEL = "integrations/test_tensor_parallel.py::test_"
PARALLEL_BASE = "integrations/test_tensor_parallel_base.py::test_"
REFUSED = "integrations/test_sharding_refused.py::test_"
DCP = "integrations/test_distributed_checkpoint.py::test_"
SHARDED = "integrations/test_sharded_checkpoint.py::test_"
FSDP1 = "integrations/test_fsdp1.py::test_"
OPTIMIZERS = "integrations/test_optimizers_of_ranks.py::test_"
IN_BACKWARD = "unit/test_in_backward.py::test_"
TOOLS = "integrations/test_distributed_tools.py::test_"
SHARDED_TOOLS = "integrations/test_fsdp2_tools.py::test_"
LOOP = "integrations/test_fsdp2_loop.py::test_"
SAVE = "integrations/test_save_adapter_on_ranks.py::test_"
CALLBACK = "integrations/test_trainer_ranks.py::test_"

FOLLOWS = DDP + "ranks_stay_equal_and_follow_one_process_and_resume_bit_for_bit"

DATA_PARALLEL = Section(
    "DistributedDataParallel",
    "A step sends nothing but the gradients that DistributedDataParallel averages. What makes ranks differ without an "
    "error is found when `optimizer.check_synced()` is called, on all ranks, which names it.",
    (
        both(
            "float32, AdamW and SGD",
            "exact",
            FOLLOWS,
            PEFT + "a_data_parallel_run_equals_one_process_on_the_whole_batch",
            note="One process that sums up the same shares of the batch; to rounding where it takes the whole batch "
            "at once.",
        ),
        Row(
            "bfloat16, float16: stochastic, compensated, nearest",
            "exact",
            "exact",
            (FOLLOWS,),
            "Compensations too, and with a product of A and B that is not zero at `start_step`.",
        ),
        both(
            "accumulation, static graph, views and sizes of buckets, unused parameters",
            "exact",
            DDP + "every_way_of_ddp_gives_the_same_run",
            note="With accumulation to rounding.",
        ),
        both(
            "W differs on a rank before the constructor",
            "exact",
            DDP + "a_w_that_differs_before_ddp_is_that_of_rank_0",
            note="The W and the base are those of rank 0, kept bases too.",
        ),
        both(
            "W differs after it, or `init_sync=False`",
            "differs: found",
            SYNCED + "a_w_that_differs_is_found_before_the_first_step_and_after_it",
            SYNCED + "what_differs_in_a_folded_run_is_found",
            CALLBACK + "a_w_that_differs_stops_all_processes_at_the_save",
            note="W stays another one on that rank. `check_synced()` raises on all ranks and names the layers; "
            "`DeltaLoRACallback` calls it when training begins, at each save and at the end.",
        ),
        Row(
            "NaN in the gradient of one rank before the average",
            "exact",
            "differs: A, B become NaN",
            (DDP + "a_gradient_of_nan_before_the_reduction_is_every_rank_s",),
            "In place every rank leaves W alone, counts it as skipped, and warns. A and B become NaN in both rules, as "
            "with AdamW alone; the folded rule writes no W, and so has nothing to skip.",
        ),
        Row(
            "NaN on one rank after the average",
            "differs: found",
            "differs: found",
            (
                SYNCED + "a_nan_on_one_rank_after_the_gradients_were_averaged_is_found",
                SYNCED + "what_differs_in_a_folded_run_is_found",
            ),
            "In place that rank leaves W alone and warns that others may not. `check_synced()` names the rank.",
        ),
        both(
            "one rank leaves out a `step()`; `Join`",
            "differs: found",
            SYNCED + "a_rank_that_left_out_a_step_is_found",
            SYNCED + "uneven_inputs_under_join_are_found",
            SYNCED + "what_differs_in_a_folded_run_is_found",
            note="`check_synced()` names the counts of steps. Under `Join` they differ with uneven inputs.",
        ),
        both(
            "ranks with other settings, seeds, names or triples",
            "differs: found",
            SYNCED + "a_setting_that_differs_is_found",
            SYNCED + "schedules_that_differ_are_found_by_their_last_value",
            SYNCED + "triples_of_other_names_or_of_another_set_are_found",
            SYNCED + "triples_in_another_order_are_found",
            SYNCED + "other_shapes_dtypes_layouts_and_inner_optimizers_are_found",
            SYNCED + "what_differs_in_a_folded_run_is_found",
            note="`check_synced()` names each setting with its values.",
        ),
        both(
            "a step, a state or an export by one rank alone",
            "exact",
            SYNCED + "no_step_and_no_state_of_a_data_parallel_run_needs_the_other_ranks",
            DDP + "one_rank_alone_saves_and_exports",
        ),
        both("resume from the whole model", "exact", FOLLOWS, note="On one process too."),
        Row(
            "resume from the adapter",
            "to rounding; 16 bits differ",
            "to rounding",
            (
                DDP + "a_run_resumes_from_the_adapter_and_the_base",
                DDP + "a_16_bit_w_is_rebuilt_with_one_rounding_alike_on_all_ranks",
            ),
            "A 16-bit W is rebuilt with one rounding, with a warning: up to 1e-2 relative in bfloat16. All ranks "
            "rebuild the same bits.",
        ),
        Row(
            "ranks with 1 and 2 threads",
            "exact",
            "-",
            (DDP + "ranks_with_other_numbers_of_threads_stay_equal",),
            "With W of 700 x 900, on the CPU that ran the test. The folded rule multiplies nothing.",
        ),
        both(
            "`for_model(ddp_model)`",
            "exact",
            WRAPPED + "the_names_are_those_of_the_model",
            WRAPPED + "the_noise_of_rounding_is_the_same",
            WRAPPED + "a_state_with_the_names_of_a_wrapper_loads_without_and_the_reverse",
            note="The names, the noise and the states are those of the model without its wrappers.",
        ),
        both(
            "the base by itself, as the reference of DPO",
            "to rounding",
            BASE + "a_data_parallel_model_gives_the_base",
            TOOLS + "the_reference_of_dpo_is_the_base_on_every_rank",
        ),
    ),
)

FULLY_SHARDED = Section(
    "FSDP2",
    "A W in 16 bits that moves in place is compared with one process that got the same A and B: no bit differs. In "
    "float32 a product of a few rows may differ in its last place. All sizes in these tests are uneven, and with r = 1 "
    "the shard of a B is empty.",
    (
        Row(
            "optimizer after `fully_shard`: layers, root, linear layers",
            "exact",
            "to rounding",
            (
                FSDP2 + "weights_move_as_in_one_process",
                FSDP2 + "fifty_steps_do_not_drift_apart",
                PEFT + "sharded_models_follow_one_process_and_resume_bit_for_bit",
                FOLDED + "folded_shards_follow_the_dense_loop",
            ),
            "`reshard_after_forward` on and off, checkpointing, accumulation.",
        ),
        both(
            "optimizer before `fully_shard`",
            "refused",
            FSDP2 + "parameters_that_are_sharded_later_need_another_optimizer",
            PEFT + "factors_that_are_sharded_too_late_are_refused",
            note="In the first step: build the optimizer afterwards.",
        ),
        Row(
            "W, A and B, or all of them in `ignored_params`",
            "exact",
            "to rounding",
            (FSDP2 + "weights_move_as_in_one_process", PEFT + "factors_that_stay_whole_follow_with_sharded_weights"),
            "Whole factors next to a sharded W have to get averaged gradients from you.",
        ),
        Row(
            "`MixedPrecisionPolicy`",
            "exact",
            "to rounding in bfloat16",
            (
                FSDP2 + "weights_move_as_in_one_process",
                FOLDED + "in_mixed_precision_a_folded_branch_is_as_far_off_as_a_lora_of_its_scaling",
            ),
            "Compute in bfloat16 is off by as much as plain LoRA of the scaling of the folded branch.",
        ),
        Row(
            "HSDP on meshes of 2 x 1, 1 x 2 and 2 x 2",
            "exact",
            "to rounding",
            (
                FSDP2 + "hybrid_sharding_moves_every_replica_alike",
                FOLDED + "folded_replicas_of_shards_follow_the_dense_loop",
            ),
            "In place on 2 x 2, folded on the other two.",
        ),
        Row(
            "sharded by columns (`shard_placement_fn`)",
            "to rounding; 16 bits differ",
            "-",
            (FSDP2 + "weights_move_as_in_one_process",),
            "At most two elements of a layer by one spacing: a product of few columns differs in float32's last place, "
            "which rounding to 16 bits shows seldom.",
        ),
        both(
            "`CPUOffloadPolicy`",
            "not measured",
            note="torch asks for an accelerator, and none of the machines that run the tests has one.",
        ),
        both(
            "`start_step` with a product that is not zero; other ratios",
            "exact",
            FSDP2 + "ratios_and_start_steps_hold",
            FSDP2 + "a_folded_ratio_writes_the_pieces_where_it_changes",
            PEFT + "a_product_that_is_not_zero_is_taken_from_sharded_weights",
        ),
        both(
            "`restart`, `resync`, `rebase`, recalling a state",
            "exact",
            FSDP2 + "an_event_moves_what_it_moves_in_one_process",
            MOVES + "every_event_ends_as_on_one_process",
            FOLDED + "an_event_of_a_folded_run_is_that_of_one_process",
        ),
        Row(
            "exports, `displacement`, `report`, merged weights, residuals",
            "to rounding",
            "to rounding",
            (
                FSDP2 + "an_event_moves_what_it_moves_in_one_process",
                FSDP2 + "merged_weights_are_sharded_as_the_weights",
                FSDP2 + "residuals_are_sharded_as_the_weights",
                FSDP2 + "a_report_says_what_it_says_in_one_process",
                FSDP2 + "figures_are_those_of_one_process",
                FOLDED + "an_event_of_a_folded_run_is_that_of_one_process",
                SAVE + "all_ranks_of_a_sharded_model_save_and_the_first_one_writes",
                CONTAINERS + "a_saved_adapter_is_of_the_whole_model_and_written_by_one_rank",
            ),
            "All ranks have to call them. `save_adapter` writes on one.",
        ),
        Row(
            "`base_weights()`, and a branch that is off",
            "to rounding",
            "to rounding",
            (
                FSDP2 + "base_weights_bring_the_base_back_and_give_it_up_again",
                FSDP2 + "a_branch_that_is_off_leaves_the_base",
                BASE + "a_fully_sharded_model_gives_the_base",
            ),
            "With a kept base and 16 bits, exact.",
        ),
        both(
            "an evaluation that leaves W gathered, then a step or a state",
            "refused",
            FSDP2 + "weights_that_an_evaluation_has_gathered_are_not_written",
            PEFT + "whole_parameters_that_were_kept_are_told_from_replaced_ones",
            note="Until `model.reshard()`, which the error says.",
        ),
        Row(
            "NaN in the loss of a rank, or in a shard of a gradient",
            "exact",
            "differs: A, B become NaN",
            (
                FOLDED + "a_loss_of_nan_on_one_rank_is_every_shard_s",
                FSDP2 + "a_factor_that_is_not_finite_on_one_rank_stops_every_move",
                RANKS + "a_number_that_is_not_finite_on_one_rank_leaves_w_on_all",
            ),
            "In place all ranks leave W alone and count it as skipped. A and B become NaN as with AdamW alone; the "
            "folded rule writes no W.",
        ),
        both(
            "a rank alone in `step`, `state_dict`, an export",
            "refused",
            FOLDED + "a_rank_that_is_alone_in_a_call_is_told_who_did_not_come",
            RANKS + "a_rank_that_does_not_come_is_named_after_the_timeout",
            RANKS + "ranks_in_different_calls_are_told_which",
            MEETING + "a_rank_whose_process_has_ended_is_named",
            note="The rank that did not come is named, after `rank_timeout` seconds; no process aborts.",
        ),
        both(
            "`GradScaler`, with an overflow in the shard of one rank",
            "exact",
            LOOP + "a_step_that_the_scaler_leaves_out_on_one_rank_is_left_out_on_all",
            note="No rank steps.",
        ),
        both(
            "`copy.deepcopy` and pickling of the optimizer",
            "upstream",
            LOOP + "the_layers_of_fsdp2_can_be_neither_copied_nor_pickled",
            note="torch refuses both for modules that are sharded. `state_dict()` can be copied.",
        ),
        both(
            "an error, other settings or other layers on one rank",
            "refused",
            RANKS + "an_exception_in_the_inner_step_of_one_rank_ends_the_step_on_all",
            RANKS + "a_check_that_fails_on_one_rank_ends_the_step_on_all",
            RANKS + "ranks_with_different_settings_are_told_at_the_first_step",
            RANKS + "ranks_with_different_layers_are_told_at_the_first_step",
            RANKS + "ranks_with_different_versions_are_told_at_the_first_step",
            RANKS + "a_ratio_that_is_set_on_one_rank_is_told_at_the_next_step",
            FOLDED + "an_error_of_one_rank_in_a_folded_step_ends_it_on_all",
            FOLDED + "other_settings_on_one_rank_of_a_folded_run_are_told_at_the_first_step",
            note="That rank raises its own error; the others name it, or the settings of each.",
        ),
        both(
            "a tied lm_head, or two triples of one W",
            "refused",
            TIED + "a_tied_and_sharded_lm_head_is_refused",
            TIED + "a_tied_weight_with_an_empty_piece_is_found",
            TIED + "two_triples_of_one_sharded_weight_are_refused",
            note="Two folded adapters of one W are taken, as nothing writes it.",
        ),
        Row(
            "embeddings, convolutions, experts, fused weights, layers of PEFT",
            "exact",
            "-",
            (
                CONTAINERS + "every_layout_moves_as_in_one_process",
                CONTAINERS + "layers_of_other_libraries_follow_the_dense_loop",
                CONTAINERS + "layers_of_peft_move_by_pefts_own_delta_weight",
            ),
            "Those of other libraries to rounding.",
        ),
    ),
)

CHECKPOINTS = Section(
    "torch.distributed.checkpoint",
    "With `get_state_dict` and `set_state_dict`.",
    (
        both(
            "asking for the state before or in training",
            "exact",
            DCP + "asking_for_the_optimizer_state_does_not_count_as_a_step",
            DCP + "asking_for_the_state_of_a_run_does_not_count_as_a_step",
            note="It counts as no step.",
        ),
        both(
            "files of DCP, and one file with `full_state_dict`",
            "exact",
            DCP + "a_round_trip_resumes_bit_for_bit",
            DCP + "with_the_whole_model_a_run_resumes_bit_for_bit",
            DCP + "ledgers_of_several_terms_reach_a_fresh_optimizer",
        ),
        both(
            "DDP, FSDP2, HSDP, tensor parallelism: onto each of them",
            "exact",
            SHARDED + "a_distributed_checkpoint_is_loaded_into_every_form",
            SHARDED + "a_run_of_real_passes_resumes_bit_for_bit",
            note="Parameters, moments, ledgers, compensations. Steps after that: exact in the same form, else to the"
            " last places of float32.",
        ),
        both(
            "from 2 ranks to 1 process and back",
            "exact",
            SHARDED + "two_ranks_continue_as_one",
            SHARDED + "one_process_continues_as_two_ranks",
            note="Steps after that to rounding.",
        ),
        both(
            "`full_state_dict`, `broadcast_from_rank0`, onto each of them",
            "exact",
            SHARDED + "a_whole_state_is_loaded_into_every_form",
            SHARDED + "a_whole_state_in_a_file_is_inspected_by_the_command_line",
        ),
        both(
            "`async_save`, and training meanwhile",
            "exact",
            SHARDED + "a_checkpoint_that_is_written_meanwhile_has_the_state_of_its_beginning",
        ),
        both(
            "the adapter alone, onto each of them",
            "to rounding",
            SHARDED + "an_adapter_resumes_in_every_form_from_the_pristine_base",
            note="From the pristine base. Relative 1e-5 in float32; compensated 16-bit weights have the same bits.",
        ),
        both(
            "a full disk, another file or other weights on one rank",
            "refused",
            SHARDED + "a_full_disk_on_one_rank_is_named_on_all_and_nothing_is_lost",
            SHARDED + "ranks_that_load_different_files_are_told",
            SHARDED + "weights_of_another_checkpoint_are_refused_on_all_ranks",
            SHARDED + "a_compensation_that_one_rank_lacks_is_told",
        ),
        Row(
            "FSDP2, and the whole model in one process from its gathered state",
            "exact",
            "to rounding",
            (
                FSDP2 + "a_whole_model_resumes_bit_for_bit",
                FSDP2 + "a_state_of_shards_fits_the_whole_weights_in_one_process",
                PEFT + "the_state_dict_of_a_sharded_model_is_for_the_registered_scaling",
            ),
            "Steps after that to rounding.",
        ),
        Row(
            "the adapter of a sharded run on its pristine base",
            "to rounding",
            "-",
            (FSDP2 + "an_adapter_resumes_on_the_pristine_base",),
        ),
        Row(
            "compensated W with `broadcast_from_rank0=True`",
            "exact",
            "-",
            (DCP + "a_compensated_run_on_two_ranks_resumes_from_a_state_on_one_rank",),
            "The compensation is saved as bytes, which gloo and NCCL can send.",
        ),
        both(
            "`flatten_optimizer_state_dict=True`",
            "refused by torch",
            DCP + "saving_a_flattened_optimizer_state_is_refused",
            note="It would drop what is no tensor.",
        ),
        both(
            "states of earlier schemas",
            "exact",
            DCP + "a_checkpoint_of_schema_4_is_loaded_by_a_planner_that_allows_missing_keys",
            DCP + "a_compensation_of_an_earlier_version_comes_through_one_file",
            SHARDED + "a_state_of_an_earlier_version_is_loaded_into_every_form",
            SHARDED + "a_compensation_of_an_earlier_version_is_cut_as_w",
        ),
    ),
)

FLATTENED = Section(
    "FSDP1",
    "",
    (
        Row(
            "`FULL_SHARD`, `SHARD_GRAD_OP`",
            "refused",
            "refused",
            (FSDP1 + "pieces_are_refused_by_the_name_of_fsdp1",),
            "By the name of FSDP1, before and after it has wrapped the model.",
        ),
        Row(
            "the same, built, stepped and saved within `summon_full_params`",
            "to rounding",
            "refused",
            (
                FSDP1 + "steps_within_summoned_parameters_follow_one_process",
                FSDP1 + "pieces_are_refused_by_the_name_of_fsdp1",
            ),
        ),
        Row(
            "`NO_SHARD`, `use_orig_params=True`",
            "to rounding",
            "refused",
            (
                FSDP1 + "whole_parameters_follow_one_process",
                FSDP1 + "whole_parameters_are_refused_in_the_folded_rule",
                FSDP1 + "the_names_are_those_of_the_model",
            ),
            "The gradients reach the flattened parameter past the hooks that the folded rule needs.",
        ),
        both(
            "`use_orig_params=False` with PEFT's policy",
            "refused",
            FSDP1 + "views_of_a_flattened_parameter_are_refused",
            note="By the name of FSDP1.",
        ),
        both(
            "`use_orig_params=False`, W with A and B in one unit",
            "upstream",
            note="torch refuses parameters with and without `requires_grad` in one unit.",
        ),
    ),
)

TENSOR_PARALLEL = Section(
    "Tensor parallelism",
    "",
    (
        Row(
            "W, A, B in any of `Shard`, `Replicate`, plain; meshes of 2 and 2 x 2",
            "exact",
            "-",
            (
                PARALLEL + "every_placement_on_two_ranks_moves_w_as_in_one_process",
                PARALLEL + "every_placement_on_two_by_two_ranks_moves_w_as_in_one_process",
                MOVES + "a_sharded_weight_has_the_bits_of_one_process",
                MOVES + "any_placement_gives_the_bits_of_one_process",
            ),
            "The folded rule reads no placement: the row below has what a forward pass can compute.",
        ),
        Row(
            "`parallelize_module`, colwise and rowwise",
            "exact; float32 to rounding",
            "to rounding",
            (
                PARALLEL + "parallelize_module_moves_w_as_in_one_process_and_gathers_nothing",
                FOLDED + "a_folded_split_model_follows_the_dense_loop",
            ),
        ),
        Row(
            "FSDP2 on tensor parallelism",
            "exact; float32 to rounding",
            "to rounding",
            (
                PARALLEL + "fully_shard_on_tensor_parallelism_moves_w_as_in_one_process",
                FOLDED + "a_folded_split_model_follows_the_dense_loop",
            ),
        ),
        Row(
            "PEFT on transformers' `DistributedConfig(tp_size=2)`",
            "to rounding",
            "to rounding",
            (
                PARALLEL_BASE + "peft_on_a_plan_of_transformers",
                FOLDED + "folded_peft_on_a_plan_of_transformers_follows_the_dense_loop",
            ),
            "Layers that are split by columns.",
        ),
        both(
            "the same with o_proj, down_proj",
            "upstream",
            note="PEFT 0.21 cannot compute LoRA in a layer that is split by rows: the shapes do not fit in the forward "
            "pass.",
        ),
        both(
            "only W split by hand, A and B plain or not split with it",
            "upstream",
            note="torch mixes no plain tensors and DTensors in a forward pass, and the shapes do not fit.",
        ),
        Row(
            "PEFT on `DistributedConfig(fsdp_size=2)`, own loop",
            "refused",
            "upstream: found",
            (
                PARALLEL_BASE + "factors_that_transformers_leaves_whole_next_to_fsdp2_have_to_be_the_same",
                PARALLEL + "whole_factors_that_differ_move_no_part_of_w",
                FOLDED + "folded_factors_that_transformers_leaves_whole_and_nobody_averages_are_found",
            ),
            "Nobody averages the gradients of A and B, so that they differ between ranks with any optimizer. In place "
            "no part of W moves. The folded rule writes no W and compares none in a step: `check_synced()` does.",
        ),
        both(
            "the same under Trainer, which averages them",
            "to rounding",
            FOLDED + "factors_that_trainer_averages_next_to_fsdp2_are_the_same",
            note="Relative 1e-5 between the rules.",
        ),
        Row(
            "the base by itself",
            "to rounding",
            "-",
            (
                PARALLEL_BASE + "the_output_without_the_branch_is_that_of_the_base",
                PARALLEL_BASE + "the_base_by_itself_under_fsdp2_on_tensor_parallelism",
                PARALLEL_BASE + "what_is_not_known_of_an_output_is_refused_in_the_forward_pass",
            ),
            "Sequence parallelism and compiled graphs are refused.",
        ),
        Row(
            "`Partial`, packed numbers, other meshes, several runs of a dimension",
            "refused",
            "-",
            (
                REFUSED + "partial_sums_are_refused",
                REFUSED + "packed_numbers_in_a_sharded_tensor_are_refused",
                REFUSED + "several_runs_of_a_dimension_are_refused",
                REFUSED + "tensors_on_meshes_of_which_none_holds_all_ranks_are_refused",
                REFUSED + "a_rank_outside_of_the_mesh_is_refused",
                REFUSED + "a_convolution_sharded_along_its_inputs_is_refused",
                REFUSED + "sizes_that_fsdp2_on_tensor_parallelism_cuts_in_another_way_than_it_says_are_refused",
            ),
        ),
    ),
)

WITHIN = Section(
    "Optimizers for several ranks, and steps within the backward pass",
    "",
    (
        both(
            "`ZeroRedundancyOptimizer` inside",
            "to rounding",
            OPTIMIZERS + "zero_redundancy_inside_follows_one_process_and_resumes",
            note="The same bits on all ranks. Resumes bit for bit after `optimizer.inner.consolidate_state_dict`.",
        ),
        both(
            "`ZeroRedundancyOptimizer` around: class, factory, built",
            "refused",
            OPTIMIZERS + "zero_redundancy_around_is_refused",
            OPTIMIZERS + "a_step_by_zero_redundancy_is_refused",
            note="By its name.",
        ),
        both("its `overlap_with_ddp`", "upstream", note="torch refuses its hook with gloo, where it may hang."),
        Row(
            "`PostLocalSGDOptimizer` inside: float32",
            "differs: 1e-5",
            "exact",
            (
                OPTIMIZERS + "local_sgd_leaves_every_rank_with_the_same_weights",
                OPTIMIZERS + "local_sgd_inside_resumes",
            ),
            "Of the movement, between ranks at an average: each rank has rounded on its own way. The test allows 5e-5.",
        ),
        Row(
            "the same: compensated rounding",
            "exact",
            "exact",
            (OPTIMIZERS + "local_sgd_leaves_every_rank_with_the_same_weights",),
        ),
        Row(
            "the same: other 16-bit W",
            "refused",
            "exact",
            (
                OPTIMIZERS + "local_sgd_inside_is_refused_where_rounding_would_part_the_ranks",
                OPTIMIZERS + "local_sgd_leaves_every_rank_with_the_same_weights",
            ),
            "By its name: rounding would leave ranks with different W.",
        ),
        Row(
            "`PostLocalSGDOptimizer` around",
            "refused",
            "exact",
            (
                OPTIMIZERS + "local_sgd_around_is_refused_in_place",
                OPTIMIZERS + "local_sgd_leaves_every_rank_with_the_same_weights",
            ),
        ),
        both(
            "`_apply_optimizer_in_backward` on A and B",
            "refused",
            IN_BACKWARD + "apply_optimizer_in_backward_is_refused_when_the_optimizer_is_built",
            IN_BACKWARD + "apply_optimizer_in_backward_afterwards_is_refused_in_the_first_step",
        ),
        both(
            "`_apply_optimizer_in_backward(DeltaLoRAOptimizer)`",
            "refused",
            OPTIMIZERS + "an_optimizer_that_is_applied_in_backward_is_refused",
        ),
        both(
            "an optimizer in `register_post_accumulate_grad_hook`",
            "refused",
            IN_BACKWARD + "a_second_step_without_gradients_on_other_factors_raises",
            IN_BACKWARD + "a_step_within_the_backward_pass_raises",
            note="In the second step, or within the backward pass where it is a `DeltaLoRAOptimizer`.",
        ),
    ),
)

LAUNCHED = Section(
    "Accelerate, Trainer, Lightning, TRL",
    "Two processes, as torchrun starts them. Accelerate and Trainer leave FSDP out on CPUs: these tests replace what "
    "they see of the hardware, and nothing else.",
    (
        both(
            "Accelerate, DDP: model or optimizer prepared first",
            "to rounding",
            TOOLS + "accelerate_follows_one_process",
            note="In float64, to 1e-10, with accumulation, clipping and a schedule.",
        ),
        both(
            "Accelerate, DDP: `save_state`, `load_state`",
            "exact",
            TOOLS + "accelerate_resumes_bit_for_bit",
            note="In the same process and in a new one.",
        ),
        Row(
            "Accelerate, DDP: `save_adapter`; `save_pretrained`",
            "to rounding; differs",
            "to rounding",
            (TOOLS + "one_process_of_accelerate_saves_what_plain_peft_loads",),
            "`save_pretrained` leaves the movement of W out where W was written, and warns: its logits differ by more "
            "than 1e-3. So it is in place, and folded after a start with a product. `save_adapter` writes all of it.",
        ),
        both(
            "Accelerate, FSDP2: sharded and full states",
            "to rounding",
            SHARDED_TOOLS + "accelerate_follows_one_process_and_resumes_bit_for_bit",
            SHARDED_TOOLS + "a_full_state_that_is_loaded_again_gives_a_scaled_branch_its_factors",
            note="In float64, to 1e-10. Resumes bit for bit. `save_adapter`, by all ranks, to 2e-5 of the logits.",
        ),
        both(
            "`accelerate launch --cpu` with FSDP or DeepSpeed",
            "upstream",
            note="accelerate leaves these plugins out on CPUs, and without a configuration file it starts one process.",
        ),
        both(
            "Trainer, DDP, with `resume_from_checkpoint`",
            "to rounding",
            TOOLS + "trainer_follows_one_process_and_resumes",
            CALLBACK + "the_processes_are_compared_at_the_beginning_at_saves_and_at_the_end",
            note="1e-5 of the logits. A checkpoint of Trainer has the adapter alone, from which each rank rebuilds W.",
        ),
        both(
            "Trainer, FSDP2, with `resume_from_checkpoint`",
            "to rounding",
            SHARDED_TOOLS + "trainer_follows_one_process_and_resumes",
            SHARDED_TOOLS + "a_sharded_checkpoint_without_the_optimizer_holds_how_far_w_has_moved",
            SHARDED_TOOLS + "the_best_model_has_the_w_of_its_step_and_is_what_is_pushed",
            note="2e-5 of the logits.",
        ),
        both(
            "Lightning, DDP, with resume",
            "exact",
            TOOLS + "lightning_follows_one_process_and_resumes_bit_for_bit",
            note="The resumed run, bit for bit. One process on the whole batch to rounding, bfloat16 to 2e-2.",
        ),
        both(
            "Lightning, `ModelParallelStrategy` with FSDP2, with resume",
            "exact",
            SHARDED_TOOLS + "lightning_follows_one_process_and_resumes_bit_for_bit",
            note="The resumed run, bit for bit.",
        ),
        both(
            "TRL's DPO, DDP",
            "to rounding",
            TOOLS + "the_reference_of_dpo_is_the_base_on_every_rank",
            note="1e-5 of the log-probabilities of a frozen copy.",
        ),
        both(
            "TRL's DPO, FSDP2",
            "to rounding",
            SHARDED_TOOLS + "the_reference_of_dpo_is_the_sharded_base",
            note="1e-5 of the log-probabilities of a frozen copy.",
        ),
    ),
)

SECTIONS = (DATA_PARALLEL, FULLY_SHARDED, CHECKPOINTS, FLATTENED, TENSOR_PARALLEL, WITHIN, LAUNCHED)
