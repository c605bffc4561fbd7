"""What a step tells the model's layers and the sampler, in buffers that stay where they are.

A CUDA graph keeps addresses, and asynchronous batching prepares a step while another runs: so each pair of the library's
inputs has buffers of its own. On a CPU the host's and the device's are the same.
"""

from __future__ import annotations

import numpy
import torch

from .. import _native
from .sampling import uniform


class _Pair:
    """The same tensor on the host, pinned, and on the device."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device):
        self.static = device.type == "cuda"
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=self.static)
        self.device = torch.zeros(shape, dtype=dtype, device=device) if self.static else self.host

    def transfer(self, non_blocking: bool) -> None:
        if self.static:
            self.device.copy_(self.host, non_blocking=non_blocking)


class RouteBuffers:
    """Which adapters the rows of a step have, for a BatchRoute."""

    def __init__(self, slots: int, max_rows: int, device: torch.device):
        self.segments = _Pair(slots, 3, dtype=torch.int32, device=device)
        self.assignments = _Pair(max_rows, dtype=torch.int32, device=device)
        self._views = self.assignments.host.numpy(), self.segments.host.numpy().reshape(-1)
        runtime, _ = _native.runtime()
        self._planner = None if runtime is None else runtime.BatchPlanner(slots)
        self.active, self.rows, self._used = False, 0, (0, 0)
        self._last: tuple = ()

    def fill(self, slots: list[int], lengths: list[int], rows: int) -> None:
        """`lengths` rows for each of `slots` (-1: no adapter), behind each other; `rows` in all, the last without."""
        self.rows = rows
        self.active = max(slots, default=-1) >= 0
        if not self.active or self._last == (
            slots,
            lengths,
            rows,
        ):  # in most steps; planning takes 74 us when caches are cold
            return
        self._last = slots, lengths, rows
        assignments, segments = self._views
        owners = numpy.array(slots, dtype=numpy.int32)
        owners = owners if len(slots) == sum(lengths) else owners.repeat(lengths)
        distinct, used = self._planner.plan(owners, assignments[:rows], segments)
        # A graph always has all segments and rows: empty segments change nothing, rows without adapter come last.
        self._used = (len(segments) // 3, rows) if self.segments.static else (distinct, used)

    def transfer(self, non_blocking: bool) -> None:
        if self.active:
            self.segments.transfer(non_blocking)
            self.assignments.transfer(non_blocking)

    def publish(self, route) -> None:
        if self.active:
            segments, assignments = self.segments.device[: self._used[0]], self.assignments.device[: self._used[1]]
            route.set(segments, assignments, True, self.rows)
        else:
            route.set(None, None, False, self.rows)


class StepBuffers:
    """Routing and sampling of one step.

    Attributes:
        tokens, heads: routes of the layers' rows and of those of the output head. drawn, nucleus, logprobs: as for
        `sampling.choose`.
    """

    def __init__(self, slots: int, max_tokens: int, max_requests: int, device: torch.device):
        self.tokens = RouteBuffers(slots, max_tokens, device)
        self.heads = RouteBuffers(slots, max_requests, device)
        self._knobs = _Pair(3, max_requests, dtype=torch.float32, device=device)
        self.drawn = self.nucleus = self.logprobs = False

    def sample(self, rows: list[tuple[object, int]]) -> None:
        """For each row of logits a Sampling, or None, and the position of the token in its sequence."""
        static = self._knobs.static
        self.logprobs = any(s is not None and s.logprobs for s, _ in rows)
        self.drawn = any(s is not None and s.temperature > 0 for s, _ in rows)
        self.nucleus = self.drawn and (static or any(s is not None and s.top_p < 1 for s, _ in rows))
        if not self.drawn:
            return
        knobs = [
            (s.temperature, s.top_p, uniform(s.seed, position)) if s is not None and s.temperature > 0 else (0.0, 1.0, 0.0)
            for s, position in rows
        ]
        self._knobs.host.zero_()
        self._knobs.host[:, : len(rows)] = torch.tensor(knobs, dtype=torch.float32).T

    def knobs(self, rows: int) -> torch.Tensor | None:
        """float32 [3, rows] for `sampling.choose`; there may be more rows than requests."""
        return self._knobs.device[:, :rows] if self.drawn else None

    def transfer(self, non_blocking: bool) -> None:
        """Copy to the device, on the current stream."""
        self.tokens.transfer(non_blocking)
        self.heads.transfer(non_blocking)
        if self.drawn:
            self._knobs.transfer(non_blocking)

    @property
    def active(self) -> bool:
        """Whether any row has an adapter."""
        return self.tokens.active or self.heads.active

    def key(self) -> tuple[bool, ...]:
        """What must be the same for a CUDA graph to be replayed, beside the widths of S where there are adapters."""
        return self.tokens.active, self.heads.active, self.drawn, self.logprobs
