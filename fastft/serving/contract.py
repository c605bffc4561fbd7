"""What of transformers' insides is used, and a look at whether it is still so: these names are nobody's promise."""

from __future__ import annotations

import functools
import importlib
import inspect
from importlib.metadata import version

FIRST, BEFORE = (5, 23), (5, 24)  # versions with which the tests ran
_ROOT = "transformers.generation.continuous_batching"

# Functions that are called or replaced, and their parameters (without self) in order.
CALLED = {
    "continuous_api.ContinuousBatchingManager.__init__": "model generation_config continuous_batching_config workload_hints",
    "continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn": "model auto_switch_to_flash",
    "continuous_api.ContinuousBatchingManager._create_batch_processor": "",
    "continuous_api.ContinuousBatchingManager._generation_loop_body": "batch_processor bootstrapping",
    "continuous_api.ContinuousBatchingManager._run_generation_loop": "",
    "continuous_api.ContinuousBatchingManager._handle_critical_error": "error batch_processor",
    "continuous_api.ContinuousBatchingManager.cancel_request": "request_id",
    "continuous_api.ContinuousBatchingManager.is_running": "",
    "continuous_api.ContinuousBatchingManager.stop": "block timeout keep_for_next_session hard_stop",
    "continuous_api.OutputRouter.deliver": "output",
    "continuous_api.OutputRouter.deliver_batch": "outputs",
    "continuous_api.OutputRouter.fail_and_deliver": "state error",
    "continuous_api.BackgroundThreadStatus.clear": "",
    "model_runner.ModelRunner._sample": "scores output_ids",
    "model_runner.ModelRunner._capture_graph": "forward_fn compute_stream args",
    "input_outputs.ContinuousBatchingIOs.prepare_batch_tensors": (
        "requests_in_batch logits_processors use_decode_fast_path num_q_tokens max_kv_read use_padding"
    ),
    "input_outputs.ContinuousBatchingIOs._transfer_inputs": "other stream non_blocking",
    "input_outputs.ContinuousBatchingIOs._get_graph_key": "",
    "input_outputs.ContinuousBatchingIOs.get_graph": "prefix",
    "utils.CudaGraphBuffer.__init__": "",
    "scheduler.Scheduler.clear_cancelled_requests": "",
    "scheduler.FIFOScheduler.schedule_batch": "token_budget cache_budget",
    "cache.PagedAttentionCache.search_prefix_match": "request_id prompt_ids",
    "cache.PagedAttentionCache.mark_complete_blocks": "state complete_blocks",
    "cache.PagedAttentionCache.update": "key_states value_states layer_idx kwargs",
    "cache.PagedAttentionCache.compute_free_capacity": "relative",
    "cache_allocators.cache_allocator.compute_block_hash": "parent_hash tokens",
    "cache_allocators.cache_allocator.CacheAllocator.get_cache_for_block_table": "layer_idx",
    "requests.RequestState.update_and_check_completion": "token_id logprob",
    "requests.RequestState.create_equivalent_initial_request": "",
}
# Functions that must go on using these names: attributes that are set there, or the calls that ours stand in.
USES = {
    "continuous_api.ContinuousBatchingManager.__init__": (
        "input_queue output_router background_thread_status batch_processor _generation_thread _wake_up_loop "
        "_original_attn_impl switch_to_cb_friendly_attn continuous_batching_config"
    ),
    "continuous_api.ContinuousBatchingManager._run_generation_loop": (
        "_create_batch_processor _generation_loop_body _handle_critical_error"
    ),
    "continuous_api.ContinuousBatchingManager._create_batch_processor": "batch_processor output_router input_queue",
    "continuous_api.ContinuousBatchProcessor.__init__": (
        "cache scheduler inputs_and_outputs model_runner use_async_batching max_batch_tokens model_device compute_stream"
    ),
    "continuous_api.ContinuousBatchProcessor._update_tp_group_state": (
        "input_queue add_waiting_request set_request_cancellation"
    ),
    "continuous_api.ContinuousBatchProcessor.prepare_next_batch": (
        "clear_cancelled_requests schedule_batch prepare_batch_tensors"
    ),
    "continuous_api.ContinuousBatchProcessor.update_batch": (
        "prepare_batch_update update_and_check_completion mark_complete_blocks finish_request deliver_batch"
    ),
    "continuous_api.BackgroundThreadStatus.__init__": "fatal_error",
    "cache.PagedAttentionCache.compute_free_capacity": "cache_allocators bytes_per_block num_sectors bytes_per_sector",
    "cache.PagedAttentionCache.evict_cached_blocks": "ledger",
    "cache_allocators.cache_allocator.BlockLedger.evict_cached_blocks": "cached_blocks",
    "model_runner.ModelRunner._forward_process_and_sample": "_sample logits_indices",
    "model_runner.ModelRunner.__init__": "mem_pool get_memory_pools",
    "model_runner.ModelRunner.compute_batch": "get_graph _capture_graph",
    "input_outputs.ContinuousBatchingAsyncIOs.__init__": "io_pairs compute_stream",
    "input_outputs.HostDeviceIOPair.__init__": "host_io device_io",
    "input_outputs.HostDeviceIOPair.transfer_inputs_h2d": "_transfer_inputs",
    "input_outputs.ContinuousBatchingAsyncIOs.get_graph": "io_pairs device_io get_graph",
    "input_outputs.ContinuousBatchingIOs.__init__": "graphs CudaGraphBuffer",
    "input_outputs.ContinuousBatchingIOs.get_graph": "_get_graph_key graphs",
    "input_outputs.ContinuousBatchingIOs.set_graph": "_get_graph_key graphs",
    "utils.CudaGraphBuffer.__del__": "reset",
    "utils.get_memory_pools": "MemPool",  # which outlives the graphs that share it
    "input_outputs.ContinuousBatchingIOs.prepare_batch_update": "output_ids return_logprobs",
    "scheduler.Scheduler.reset": "waiting_requests _requests_to_cancel block_new_requests",
    "scheduler.FIFOScheduler.schedule_batch": "block_new_requests",
    "scheduler.Scheduler._infer_request_tokens": "search_prefix_match",
    "cache.PagedAttentionCache.__init__": "device cache_allocators layer_to_allocator num_blocks max_batch_tokens",
    "cache_allocators.cache_allocator.CacheAllocator._before_cache_tensor_init": (
        "block_table block_physical_stride tokens_per_page"
    ),
    "cache_allocators.cache_allocator.CacheAllocator._after_cache_tensor_init": "read_trash_index write_trash_index",
    "cache_allocators.cache_allocator.CacheAllocator.match_prefix_blocks": "compute_block_hash",
    "cache_allocators.cache_allocator.CacheAllocator.mark_complete_blocks": "compute_block_hash",
    "cache_allocators.full_attention.FullAttentionCacheAllocator.get_cache_for_block_table": "_kv_page_views",
}
# Fields of data classes and the like.
FIELDS = {
    "requests.RequestState": (
        "request_id initial_tokens max_new_tokens eos_token_id generated_tokens position_offset _true_initial_tokens"
    ),
    "requests.FutureRequestState": "state has_new_token query_length",
    "requests.RequestStatus": "FINISHED",
    "...configuration_utils.ContinuousBatchingConfig": (
        "page_size num_blocks max_batch_tokens max_requests_per_batch allow_block_sharing return_logprobs "
        "auto_switch_to_flash"
    ),
}


class UnsupportedLibrary(RuntimeError):
    """transformers is of a version whose continuous batching is not what the engine was made for."""


@functools.cache
def check_library() -> None:
    """Raises UnsupportedLibrary, or ImportError if transformers isn't there."""
    try:
        found = version("transformers")
    except ImportError as error:
        raise ImportError("fastft.serving needs transformers: pip install 'fastft[serve]'") from error
    wanted = f"transformers>={FIRST[0]}.{FIRST[1]},<{BEFORE[0]}.{BEFORE[1]}"
    if not FIRST <= tuple(int(part) for part in found.split(".")[:2]) < BEFORE:
        raise UnsupportedLibrary(f"transformers {found} is installed; serving works with {wanted}: pip install '{wanted}'")
    changed = changes()
    if changed:
        raise UnsupportedLibrary(
            f"transformers {found} has changed inside, serving can't use it: {'; '.join(changed)}. pip install '{wanted}'"
        )


def changes() -> list[str]:
    """What of CALLED, USES and FIELDS is not so, in words."""
    found = []
    for name, parameters in CALLED.items():
        value = _find(name)
        has = None if value is None else [p for p in inspect.signature(value).parameters if p != "self"]
        if has != parameters.split():
            found.append(f"{name} {'is gone' if has is None else f'takes ({chr(44).join(has)})'}, wanted ({parameters})")
    for name, names in USES.items():
        value = _find(name)
        code = getattr(inspect.unwrap(value), "__code__", None) if value is not None else None
        gone = set(names.split()) - _names(code) if code is not None else {"it"}
        found += [f"{name} no longer uses {', '.join(sorted(gone))}"] if gone else []
    for name, names in FIELDS.items():
        value = _find(name)
        gone = [field for field in names.split() if not _has(value, field)]
        found += [f"{name} has no {', '.join(gone)}"] if gone else []
    return found


def _find(name: str):
    """The object of a dotted name below the library's folder (leading dots: upwards), or None."""
    parts = name.split(".")
    if name.startswith("..."):
        module, rest = "transformers.generation.configuration_utils", parts[-1:]
    else:
        depth = 2 if parts[0] == "cache_allocators" else 1
        module, rest = ".".join([_ROOT, *parts[:depth]]), parts[depth:]
    try:
        value = importlib.import_module(module)
        for part in rest:
            value = inspect.getattr_static(value, part) if inspect.isclass(value) else getattr(value, part)
    except (ImportError, AttributeError):
        return None
    return value


def _names(code) -> set[str]:
    """Every name and attribute in a function, those inside it included."""
    names = {*code.co_names, *code.co_varnames, *(c for c in code.co_consts if isinstance(c, str))}
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= _names(constant)
    return names


def _has(value, field: str) -> bool:
    return value is not None and (hasattr(value, field) or field in getattr(value, "__dataclass_fields__", ()))
