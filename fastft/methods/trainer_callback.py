"""The handle's face towards transformers' Trainer; imported only when asked for."""

from pathlib import Path

from ..modules.merging import DATA_PARALLEL


def trainer_callback(handle):
    """A `TrainerCallback` for the model that `handle` is attached to."""
    from transformers import TrainerCallback

    class FastftCallback(TrainerCallback):
        """Checks that the adapter is trained, runs its schedule, saves it in ``checkpoint-N/adapter``."""

        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            if handle.method.trains_merged:
                _check_run(handle, args, model)
            handle.total_steps = state.max_steps
            if state.global_step == 0 and handle.method.updates(handle):  # nothing is resumed
                handle.new_run()
            sharded = _deepspeed(args) or getattr(args, "fsdp", None)  # these replace parameters
            if optimizer is not None and not sharded:
                _check_optimizer(handle, optimizer)

        def on_optimizer_step(self, args, state, control, **kwargs):
            handle.step()

        def on_save(self, args, state, control, **kwargs):
            # A subfolder: with adapter_config.json in it, transformers would take the checkpoint itself for an adapter.
            if state.is_world_process_zero or handle.sharded:  # then all processes gather what one writes
                handle.save(_checkpoint(args, state) / "adapter")

    return FastftCallback()


def _deepspeed(args) -> bool:
    """By Trainer's own argument, or by `accelerate launch`."""
    return bool(getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None))


def _check_run(handle, args, model):
    """Raises RuntimeError where a method that trains the weights in place would fail, or see no update."""
    if _deepspeed(args):
        raise RuntimeError(
            f"{type(handle.method).__name__} trains parts of the weights in place, and DeepSpeed (at any stage of ZeRO) "
            f"updates copies of its own, so that the weights would not follow adapter {handle.name!r}: train with "
            "DistributedDataParallel, i.e. torchrun without a DeepSpeed config"
        )
    quantized = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    if getattr(args, "n_gpu", 1) > 1 and not quantized:  # those Trainer leaves on one GPU
        raise RuntimeError(DATA_PARALLEL)


def _checkpoint(args, state):
    """The folder that Trainer has just written. A hyperparameter search has one for each trial, whose names it keeps to
    itself."""
    name = f"checkpoint-{state.global_step}"
    if not state.is_hyper_param_search:
        return Path(args.output_dir, name)
    written = Path(args.output_dir).rglob(f"{name}/trainer_state.json")  # its last file
    return max(written, key=lambda path: path.stat().st_mtime_ns).parent


def _check_optimizer(handle, optimizer):
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in handle.named_parameters() if p.requires_grad and id(p) not in trained]
    if missing:
        raise RuntimeError(
            f"{len(missing)} parameters of adapter {handle.name!r} are not in the optimizer ({', '.join(missing[:5])}); "
            "attach before the Trainer makes its optimizer"
        )
