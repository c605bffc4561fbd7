"""What this machine can do at most: its copy bandwidth, its rate of matrix products, the sizes of its caches.

Measured before the cases of a run, on as many threads: a time is then also told as a fraction of the roofline, the least
time that its operations and its bytes take at these rates. ``fastft bench calibration`` measures nothing else.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import results, rounds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS, LEAST_CALLS, SLOW = 0.2, 3, 0.5  # that a rate is measured for; a larger product must not take longer than SLOW
SIDES = {"cpu": (256, 2048), "cuda": (1024, 8192)}  # of the matrices, from the smallest to the largest
COPIED = {"cpu": (256 << 20, 512 << 20), "cuda": (1 << 30, 1 << 30)}  # bytes of the array, at least and at most
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Rates:
    """copy: bytes read and written, a second; gemm: dtype -> operations a second (a multiply-add is two); caches: bytes."""

    copy: float
    gemm: dict[str, float]
    caches: dict[str, int] = field(default_factory=dict)

    def fraction(self, flops: int, moved: int, dtype: str, seconds: float) -> float | None:
        """Which part of `seconds` the roofline leaves; None where the dtype's rate is not known, or nothing was counted.

        dtype: a case's; of "bf16+fp32" the base's, whose products are nearly all of the operations.
        """
        rate = self.gemm.get(dtype.split("+")[0])
        if (flops and rate is None) or not (flops or moved):
            return None
        return max(flops / rate if flops else 0.0, moved / self.copy) / seconds


def measure(device) -> Rates:
    """The rates of `device`, on a CPU on the threads that PyTorch uses now. Takes a few seconds."""
    device = torch.device(device)
    caches = cache_sizes(device)
    largest = max(caches.values(), default=0)
    least, most = COPIED[device.type]
    source = torch.ones(min(max(4 * largest, least), most), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _seconds(lambda: target.copy_(source), device)
    return Rates(copy, {name: _gemm(dtype, device) for name, dtype in DTYPES.items()}, caches)


def _gemm(dtype: torch.dtype, device) -> float:
    """Operations a second of square products, the best of growing ones: up to what takes too long where a CPU emulates."""
    side, largest = SIDES[device.type]
    best = 0.0
    while True:
        took = _seconds(_product(side, dtype, device), device)
        best = max(best, 2 * side**3 / took)
        if side == largest or 8 * took > SLOW:
            return best
        side *= 2


def _product(side: int, dtype, device):
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _seconds(call, device) -> float:
    """The shortest of several calls: what the machine can do, not what its neighbours leave."""
    begin, end, between = rounds.clock(device)
    call()
    best, calls, started = float("inf"), 0, time.perf_counter()
    while calls < LEAST_CALLS or time.perf_counter() - started < SECONDS:
        start = begin()
        call()
        best = min(best, between(start, end()))
        calls += 1
    return best


def cache_sizes(device) -> dict[str, int]:
    """Level -> bytes of what one core sees: L1d, L2, L3 of a CPU (empty where the system doesn't tell), L2 of a GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return {"L2": torch.cuda.get_device_properties(device).L2_cache_size}
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            number, unit = int(size[:-1]), {"K": 1 << 10, "M": 1 << 20}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
        if kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' and level == '1' else ''}"] = number * unit
    return found


def rows(rates: Rates, env: dict[str, str], status: str = "ok") -> list[dict[str, str]]:
    """Rows of the results' columns."""
    same = env | {"family": "calibration", "implementation": "machine", "status": status}
    found = [same | {"case": "copy", "metric": "bandwidth", "value": f"{rates.copy:.6g}", "unit": "B/s"}]
    for dtype, rate in rates.gemm.items():
        row = {"case": "gemm", "dtype": dtype, "metric": "gemm_rate", "value": f"{rate:.6g}", "unit": "FLOP/s"}
        found.append(same | row)
    for level, size in rates.caches.items():
        found.append(same | {"case": "cache", "shape": level, "metric": "cache_bytes", "value": size, "unit": "B"})
    return found


def place(case, measurements, rates: Rates) -> None:
    """Tell each measurement's fraction of the roofline, by the operations and bytes that the case counts."""
    for m in measurements:
        if m.seconds:
            floor = m.implementation.startswith("floor")
            work = (case.floor_flops, case.floor_moved) if floor else (case.flops, case.moved)
            m.roofline = rates.fraction(*work, case.dtype, m.seconds)


def show(rates: Rates) -> None:
    lines = [("copy, read and written", f"{rates.copy / 1e9:.4g} GB/s")]
    lines += [(f"matrix product, {dtype}", f"{rate / 1e9:.4g} GFLOP/s") for dtype, rate in rates.gemm.items()]
    lines += [(f"cache {level}", results.size(size)) for level, size in rates.caches.items()]
    results.show("This machine at most", [("", ""), *lines])
