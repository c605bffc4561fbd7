"""Runs of one op with one configuration on a GPU: whether it can run and is right, and what it takes beside others."""

from collections.abc import Callable
from unittest import mock

import torch

from fastft import testing
from fastft.ops import registry

from . import graphs, op_problems, rounds
from .runner import relative_error

MAX_SETS, CALLS = 16, 2  # copies of the arguments; calls of each in a graph
SLACK = 2.0  # of the error that the configuration in use makes


def copies(args) -> tuple:
    return tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)


def outcome(op: str, run: Callable, args) -> list[torch.Tensor]:
    """What `run` gives for copies of these arguments: results, then the arguments that the op changes."""
    own = copies(args)
    with torch.no_grad():
        found = run(*own)
    results = [] if found is None else [found] if isinstance(found, torch.Tensor) else list(found)
    return results + [own[i] for i in op_problems.mutated(op) if own[i] is not None]


def errors(op: str, args, found, wanted) -> list[float]:
    """Of each output the relative error, of what the op changes that of the change; of integers 0 or infinity."""
    assert len(found) == len(wanted), f"{len(found)} outputs, {len(wanted)} wanted"
    changed = [args[i] for i in op_problems.mutated(op) if args[i] is not None]
    told = []
    for got, want, before in zip(found, wanted, [None] * (len(wanted) - len(changed)) + changed):
        if got.shape != want.shape or got.dtype.is_floating_point != want.dtype.is_floating_point:
            told.append(float("inf"))
        elif not got.dtype.is_floating_point:
            told.append(0.0 if torch.equal(got, want) else float("inf"))
        elif before is None:
            told.append(relative_error(got, want))
        else:
            told.append(relative_error(got.double() - before.double(), want.double() - before.double()))
    return told


class Bench:
    """One problem on one device: `why_not` and `times` of configurations, as `fastft.tune.search` asks for them.

    Args:
        launcher: the op's Triton launcher, called as launcher(*args, config=config).

    Raises:
        RuntimeError: the configuration in use does not give what the reference does.
    """

    def __init__(self, problem: op_problems.Problem, launcher: Callable, current: dict, device, linear=None):
        self._op, self._launcher, self._device = problem.op, launcher, torch.device(device)
        self._args = problem.make(self._device, 0)
        with testing.use("reference"):
            self._wanted = outcome(self._op, registry.OPS[self._op], self._args)
        own = errors(self._op, self._args, outcome(self._op, self._run(current), self._args), self._wanted)
        self._allowed = [max(SLACK * error, _half_ulp(want)) for error, want in zip(own, self._wanted)]
        if not all(error < 0.05 for error in own):
            raise RuntimeError(f"{problem}: the configuration in use is wrong, relative errors {_short(own)}: {current}")

    def _run(self, config):
        return lambda *args: self._launcher(*args, config=config)

    def why_not(self, config: dict) -> str | None:
        """Why a configuration is left out, or None: it does not compile or fit, spills registers, or gives wrong results."""
        try:
            with compiled() as kernels:
                found = outcome(self._op, self._run(config), self._args)
                self._synchronize()
        except Exception as error:  # whatever Triton's compiler and driver raise for blocks that they can't do
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]
        if spills := max((getattr(kernel, "n_spills", 0) or 0 for kernel in kernels), default=0):
            return f"spills {spills} registers"
        told = errors(self._op, self._args, found, self._wanted)
        if not all(error <= allowed for error, allowed in zip(told, self._allowed)):
            return "wrong results: relative errors {}, allowed {}".format(*(_short(n) for n in (told, self._allowed)))
        return None

    def times(self, configs: list[dict], count: int) -> list[list[float]]:
        """Seconds of a call with each configuration in `count` rounds, in random order within each."""
        sets, pool = self._sets(), graphs.new_pool()
        runs = {}
        for i, config in enumerate(configs):
            run = self._run(config)

            def each(run=run):
                for args in sets * CALLS:
                    run(*args)

            runs["floor" if i == 0 else str(i)] = [graphs.capture(each, pool)]
        took = rounds.interleaved(runs, self._device, count)
        return [[seconds / (CALLS * len(sets)) for seconds in took[name]] for name in runs]

    def _sets(self) -> list[tuple]:
        """Copies of the arguments that together exceed the L2 three times."""
        one = sum(arg.nbytes for arg in self._args if isinstance(arg, torch.Tensor))
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        return [copies(self._args) for _ in range(max(2, min(MAX_SETS, -(-3 * cache // max(one, 1)) + 1)))]

    def _synchronize(self):
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _short(numbers) -> str:
    return ", ".join(f"{number:.1e}" for number in numbers)


def _half_ulp(tensor) -> float:
    return torch.finfo(tensor.dtype).eps / 2 if tensor.dtype.is_floating_point else 0.0


class compiled:
    """The kernels that Triton launches meanwhile, as a list."""

    def __enter__(self) -> list:
        from triton.runtime import JITFunction

        kernels, run = [], JITFunction.run

        def recorded(kernel, *args, **options):
            kernels.append(run(kernel, *args, **options))
            return kernels[-1]

        self._patch = mock.patch.object(JITFunction, "run", recorded)
        self._patch.start()
        return kernels

    def __exit__(self, *exc):
        self._patch.stop()
