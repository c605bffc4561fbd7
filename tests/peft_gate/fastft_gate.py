"""pytest plugin that runs PEFT's own tests on accelerated models (`make test-peft`).

Every PeftModel is accelerated as soon as it is built. The run fails unless no test failed and, of the forwards that had a
low-rank term to compute, at least `SHARE` ran on fastft's ops. Which ones had is decided here, by PEFT's state alone, and
that our ops ran by their launches: `fastft.report`'s own counts are not asked. Lives outside of a package, because PEFT's
tests are called ``tests`` too.
"""

import functools
import os

import pytest

SHARE = 0.95
COUNTS = {"forwards": 0, "ours": 0, "accelerated models": 0}
_reasons: dict[str, int] = {}
_collected: list[dict] = []  # of the workers


def pytest_configure(config):
    import peft
    from peft.tuners.lora.layer import Linear

    import fastft
    from fastft.integrations import peft_layers

    if os.environ.get("FASTFT_GATE") != "off":  # off: the counts must then fail the run
        for cls in (peft.PeftModel, peft.PeftMixedModel):
            cls.__init__ = _accelerating(cls.__init__)
        peft.inject_adapter_in_model = _accelerating(peft.inject_adapter_in_model)
    plain, fast = Linear.forward, peft_layers.FastLinear.forward

    @functools.wraps(plain)
    def counted_plain(self, x, *args, **kwargs):
        if type(self) is Linear and _has_term(self, kwargs):
            COUNTS["forwards"] += 1
            _reasons["never accelerated"] = _reasons.get("never accelerated", 0) + 1
        return plain(self, x, *args, **kwargs)

    @functools.wraps(fast)
    def counted_fast(self, x, *args, **kwargs):
        if kwargs.get("adapter_names") is None and peft_layers.index_of(self) is not None:
            return fast(self, x, *args, **kwargs)  # comes back here with the names
        if not _has_term(self, kwargs):
            return fast(self, x, *args, **kwargs)
        with fastft.testing.record() as launches:
            y = fast(self, x, *args, **kwargs)
        COUNTS["forwards"] += 1
        COUNTS["ours"] += bool(launches)
        if not launches:
            _reasons[str(self._fastft.reason)] = _reasons.get(str(self._fastft.reason), 0) + 1
        return y

    Linear.forward, peft_layers.FastLinear.forward = counted_plain, counted_fast


def _accelerating(build):
    """build: a constructor, or a function that returns the model."""
    from peft.tuners.lora.layer import LoraLayer

    import fastft

    @functools.wraps(build)
    def built(*args, **kwargs):
        result = build(*args, **kwargs)
        model = args[0] if result is None else result
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            fastft.accelerate(model)
            COUNTS["accelerated models"] += 1
        return result

    return built


def _has_term(layer, kwargs) -> bool:
    """Does PEFT compute a low-rank term in this forward, by its own rules, and are all of them plain LoRA's or DoRA's?"""
    if layer.disable_adapters or layer.merged:
        return False
    names = kwargs.get("adapter_names")
    names = [name for name in (layer.active_adapters if names is None else names) if name in layer.lora_A]
    kinds = {type(layer.lora_variant[name]).__name__ for name in names if name in layer.lora_variant}
    return bool(names) and kinds <= {"DoraLinearVariant", "MiCALinearVariant"}


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fastft"] = {"counts": COUNTS, "reasons": _reasons}
        return
    counts, _ = _total()
    if counts["ours"] < SHARE * counts["forwards"] or not counts["ours"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    if "fastft" in getattr(node, "workeroutput", {}):
        _collected.append(node.workeroutput["fastft"])


def pytest_terminal_summary(terminalreporter):
    counts, reasons = _total()
    share = counts["ours"] / counts["forwards"] if counts["forwards"] else 0.0
    terminalreporter.section("fastft")
    terminalreporter.line(
        f"{counts['accelerated models']} models accelerated; of {counts['forwards']} forwards of LoRA layers with a term to "
        f"compute {counts['ours']} ran on fastft's ops: {share:.1%} (at least {SHARE:.0%} must)"
    )
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        terminalreporter.line(f"  {count} on PEFT's path: {reason}")
    if share < SHARE:
        terminalreporter.line("FAILED: fastft's ops ran too seldom", red=True)


def _total():
    counts, reasons = dict(COUNTS), dict(_reasons)
    for worker in _collected:
        for into, key in ((counts, "counts"), (reasons, "reasons")):
            for name, count in worker[key].items():
                into[name] = into.get(name, 0) + count
    return counts, reasons
