"""Merging adapters' deltas into a module's own tensors, and taking them out without a trace.

While deltas are merged, the buffers ``_pristine_weight`` and (where a delta changes it) ``_pristine_bias`` keep the bits
from before. The tensors are always recomputed as round(pristine and all merged deltas in float32), so any order of merging
and detaching is exact, and ``state_dict`` shows the pristine base.
"""

import torch
from torch import nn

_PRISTINE = "_pristine_"


def pristine(module: nn.Module, own: str) -> torch.Tensor:
    """One of a module's own tensors as it is without merged deltas."""
    stored = module._buffers.get(_PRISTINE + own)
    return getattr(module, own) if stored is None else stored


class Mergeable(nn.Module):
    """Mixed into adapted modules; `_adapters` holds the adapters by name, `_merged` the names of the merged ones."""

    def edited(self, name: str) -> tuple[str, ...]:
        """The own tensors that adapter `name`'s delta changes."""
        return ("weight",)

    def merge_obstacle(self, name: str) -> str | None:
        """Why adapter `name` can't be merged here, or None."""
        return None

    def _add_delta(self, totals: dict[str, torch.Tensor], name: str) -> None:
        """Add adapter `name`'s delta to the totals of the tensors it edits, in place, in their layout and (float32 or
        float64) dtype. A total holds the pristine tensor and the merged adapters that were attached before.

        All that a further kind of delta has to say: storing, merging and restoring are here.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight delta to merge")

    def set_merged(self, adapter, merged: bool) -> None:
        """Put the adapter's delta into the own tensors, or take it out. The pristine bits come back with the last one."""
        if merged == (adapter.name in self._merged):
            return
        if merged:
            for own in self.edited(adapter.name):
                if _PRISTINE + own not in self._buffers:
                    self.register_buffer(_PRISTINE + own, getattr(self, own).detach().clone(), persistent=False)
            self._merged.append(adapter.name)
        else:
            self._merged.remove(adapter.name)
            edited = {own for name in self._merged for own in self.edited(name)}
            for own, value in self._stored().items():
                if own not in edited:
                    with torch.no_grad():
                        getattr(self, own).copy_(value)
                    delattr(self, _PRISTINE + own)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the merged tensors after adapters changed."""
        stored = self._stored()
        totals = {own: value.to(torch.promote_types(value.dtype, torch.float32), copy=True) for own, value in stored.items()}
        for name in self._adapters:  # in the order of attaching, whatever the order of merging
            if name in self._merged:
                self._add_delta(totals, name)
        for own, total in totals.items():
            getattr(self, own).copy_(total)

    @torch.no_grad()
    def fold(self, adapter) -> None:
        """Make the adapter's copies and delta part of the pristine base for good. The adapter is spent afterwards."""
        merged = [self._adapters[name] for name in self._merged]
        for other in merged:
            self.set_merged(other, False)
        for own, value in self._copies([adapter]).items():
            getattr(self, own).copy_(value)
        if adapter.name in self._settings:
            self.set_merged(adapter, True)
            self._merged.clear()
            for own in self._stored():
                delattr(self, _PRISTINE + own)
        for other in merged:
            if other is not adapter:
                self.set_merged(other, True)

    def _stored(self) -> dict[str, torch.Tensor]:
        """The pristine bits of what is merged."""
        return {key[len(_PRISTINE) :]: value for key, value in self._buffers.items() if key.startswith(_PRISTINE)}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for own, value in self._stored().items():
            destination[prefix + own] = value

    def _load_from_state_dict(self, *args, **kwargs):
        stored = self._stored()
        if not stored:
            return super()._load_from_state_dict(*args, **kwargs)
        with torch.no_grad():
            for own, value in stored.items():
                getattr(self, own).copy_(value)
            super()._load_from_state_dict(*args, **kwargs)
            for own, value in stored.items():
                value.copy_(getattr(self, own))

        def merge_again(module, incompatible_keys):  # the factors are children and load after this method
            hook.remove()
            module.refresh()

        hook = self.register_load_state_dict_post_hook(merge_again)
