"""An adapter's values in files: what a handle saves and reads back, also where parameters are divided among processes."""

from typing import Any

import torch

from ..checkpoint.files import AdapterFileError, read_adapter, write_adapter
from ..modules.sharding import is_sharded, reshard, shares


class AdapterFiles:
    """Mixed into `Handle`."""

    model: torch.nn.Module
    method: Any
    targets: dict[str, Any]

    def save(self, directory, absolute: bool = False) -> None:
        """Write adapter_config.json and adapter_model.safetensors, of LoRA those that PEFT also reads, into `directory`.

        With `absolute` (methods that train entries of weights) the file holds the entries' values as they stand in the
        weights, in their dtype, and nothing that only training needs: the smallest file. `fastft.load` reads it too, for use
        and merging: trained on, all of its entries would train, also those that LIFT had only kept.

        Atomic: whenever the process is killed, `fastft.load` finds the old adapter or the new one. Other files in the
        folder are left alone.

        Under fully_shard every process must call it: all gather the tensors, rank 0 writes, and all return when it has.

        Raises:
            ValueError: FSDP or DeepSpeed left a part of the tensors here, which can't be gathered from within; `absolute`
                with a method that has no such values.
        """
        self.method.before_save(self)
        tensors = {key: tensor.detach() for key, tensor in self._file_tensors(absolute).items()}
        config = {**self.method.to_config(self.targets), **self.method.describe(self, absolute)}
        config["base_model_name_or_path"] = getattr(self.model, "name_or_path", None) or None
        config["auto_mapping"] = {
            "base_model_class": type(self.model).__name__,
            "parent_library": type(self.model).__module__,
        }
        if not self.sharded:
            return write_adapter(directory, config, tensors)
        rank = torch.distributed.get_rank()
        for key in sorted(tensors):  # one after the other, so that a GPU never holds all of them whole
            tensor = tensors[key].full_tensor() if is_sharded(tensors[key]) else tensors[key]
            tensors[key] = tensor.cpu() if rank == 0 else None
        try:
            if rank == 0:
                write_adapter(directory, config, tensors)
        finally:
            torch.distributed.barrier()

    def restore(self, directory) -> None:
        """Read a saved state of this adapter into its parameters, which keep their identity (to resume training).

        Under fully_shard every process must call it, and reads the folder.

        Raises:
            as `fastft.load`; AdapterFileError also if the folder holds an adapter with another scale or other slices.
        """
        own, saved = self._file_tensors(), None

        def expected(config):
            nonlocal saved
            saved = self.method.read(directory, config)
            if saved.peft_type != self.method.peft_type:
                raise AdapterFileError(
                    f"{directory}: an adapter of {saved.peft_type}, not of {self.method.peft_type} as {self.name!r} is"
                )
            for name in self.targets:
                if saved.placement(name) != self.method.placement(name):
                    raise AdapterFileError(
                        f"{directory}: the {self.method.placed_by} of {name!r} is {saved.placement(name)}, that of adapter "
                        f"{self.name!r} {self.method.placement(name)}; fastft.load attaches it as it is"
                    )
            shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
            return shapes if self.method.fixed_shapes else {**self._copied(shapes), **saved.expected(self.targets)}

        values = read_adapter(directory, expected)
        saved.check_file(directory, self.targets, values)
        with torch.no_grad():
            for key in self._copied(own):
                own[key].copy_(shares(values[key], own[key]))
            for name, module in self.targets.items():
                parts = [part for part in self.method.file_names if self.method.target_key(name, part) in values]
                tensors = {part: values[self.method.target_key(name, part)] for part in parts}
                self.method.refill(name, module, self._adapter, tensors)
        self.method.resume(saved)

    def _copied(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Those of modules that are trained in full."""
        ours = {self.method.target_key(name, part) for name in self.targets for part in self.method.file_names}
        return {key: tensor for key, tensor in tensors.items() if key not in ours}

    def _file_tensors(self, absolute: bool = False) -> dict[str, torch.Tensor]:
        """By key; parameters as they are, so that it shows what is one."""
        tensors = {}
        reshard(self.model)  # else what an evaluation gathered would be saved, or restored into
        for path, module in self._attached().items():
            for own, tensor in module.copies_of(self._adapter):
                tensors[self._matched.copy_key(path, own)] = tensor
            if path in self.targets:
                for part, tensor in self.method.file_tensors(module, self._adapter, absolute).items():
                    tensors[self.method.target_key(path, part)] = tensor
        parts = [key for key, tensor in tensors.items() if tensor.shape != self._shapes.get(key, tensor.shape)]
        if parts:
            raise ValueError(
                f"{len(parts)} tensors of adapter {self.name!r} are not whole here, FSDP or DeepSpeed's ZeRO-3 divided "
                f"them: {', '.join(f'{key} {list(tensors[key].shape)}' for key in parts[:5])}; gather them around the call, "
                "with FullyShardedDataParallel.summon_full_params(model) or "
                "deepspeed.zero.GatheredParameters(list(handle.parameters()))"
            )
        return tensors
