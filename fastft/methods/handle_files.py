"""An adapter's values in files: what a handle saves and reads back, also where parameters are divided among processes."""

from typing import Any

import torch

from ..checkpoint.files import AdapterFileError, read_adapter, write_adapter
from ..modules.sharding import is_sharded, shares


class AdapterFiles:
    """Mixed into `Handle`."""

    model: torch.nn.Module
    method: Any
    targets: dict[str, Any]

    def save(self, directory) -> None:
        """Write adapter_config.json and adapter_model.safetensors, which PEFT also reads, into `directory`.

        Atomic: whenever the process is killed, `fastft.load` finds the old adapter or the new one. Other files in the
        folder are left alone.

        Under fully_shard every process must call it: all gather the tensors, rank 0 writes, and all return when it has.

        Raises:
            ValueError: FSDP or DeepSpeed left a part of the tensors here, which can't be gathered from within.
        """
        tensors = self._file_tensors()
        config = self.method.to_config(self.targets)
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
        own = self._file_tensors()

        def expected(config):
            saved = self.method.read(directory, config)
            for name in self.targets:
                if saved.placement(name) != self.method.placement(name):
                    raise AdapterFileError(
                        f"{directory}: the {self.method.placed_by} of {name!r} is {saved.placement(name)}, that of adapter "
                        f"{self.name!r} {self.method.placement(name)}; fastft.load attaches it as it is"
                    )
            return {key: tuple(tensor.shape) for key, tensor in own.items()}

        values = read_adapter(directory, expected)
        self.method.check_file(directory, self.targets, values)
        stood = [module for module in self.targets.values() if self.name in module._parts and self.name in module._merged]
        for module in stood:  # the slices may lie elsewhere afterwards
            module.set_merged(self._adapter, False)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(shares(values[key], tensor))
        for module in self.targets.values():
            module.forget_indices()
            module.set_merged(self._adapter, True) if module in stood else module.refresh()

    def _file_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for path, module in self._attached().items():
            for holder, own, tensor in module.adapter_tensors(self._adapter):
                key = self._matched.copy_key(path, own) if own else self.method.target_key(path, holder)
                tensors[key] = tensor.detach()
        parts = [key for key, tensor in tensors.items() if tensor.shape != self._shapes.get(key, tensor.shape)]
        if parts:
            raise ValueError(
                f"{len(parts)} tensors of adapter {self.name!r} are not whole here, FSDP or DeepSpeed's ZeRO-3 divided "
                f"them: {', '.join(f'{key} {list(tensors[key].shape)}' for key in parts[:5])}; gather them around the call, "
                "with FullyShardedDataParallel.summon_full_params(model) or "
                "deepspeed.zero.GatheredParameters(list(handle.parameters()))"
            )
        return tensors
