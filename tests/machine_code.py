"""What a compiled GPU kernel's text shows: tensor-core instructions, and how wide it reads and writes global memory.

NVIDIA's machine code (SASS) as cuobjdump prints it, AMD's as the assembler does.
"""

import re

# HMMA: mma.sync. HGMMA: wgmma of compute capability 9.0. UTC..MMA: tcgen05 of 10.0. v_mfma: AMD's matrix cores.
_TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA|v_mfma_\w+)\b")
# LDGSTS is an asynchronous copy to shared memory.
_NVIDIA = re.compile(r"\b(LDG|LDGSTS|STG)\.([A-Z0-9.]+)")
_AMD = re.compile(r"\b(?:global|buffer|flat)_(load|store)_([a-z0-9]+)")
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "sshort": 2}


def seen(code: str) -> dict:
    """{"tensor_cores": whether it has such an instruction, "load", "store": bytes of a thread's widest one, 0 if none}."""
    code = " ".join(set(code.split()))  # each word once: a hundredth of the text
    widths = {"load": [0], "store": [0]}
    for instruction, modifiers in _NVIDIA.findall(code):
        widths["store" if instruction == "STG" else "load"].append(_nvidia_bytes(modifiers.split(".")))
    for direction, kind in _AMD.findall(code):
        widths[direction].append(_AMD_BYTES.get(kind, 1))
    return {"tensor_cores": bool(_TENSOR_CORES.search(code)), **{name: max(found) for name, found in widths.items()}}


def _nvidia_bytes(modifiers) -> int:
    bits = [re.fullmatch(r"[US]?(8|16|64|128|256)", word) for word in modifiers]
    return next((int(match[1]) // 8 for match in bits if match), 4)


SLACK = 16  # registers; another compiler allocates a little differently
_LESS_IS_WORSE = ("tensor_cores", "load", "store")


def worse(kernel: str, target: str, before: dict, now: dict) -> list[str]:
    """What of a kernel became worse than its row of a committed table: more registers (beyond `SLACK`) or memory, tensor
    cores or wide accesses lost. Fields that only one of the rows has are left out.
    """
    found = []
    for field in before.keys() & now.keys():
        slack = SLACK if field == "registers" else 0
        lost = now[field] < before[field] if field in _LESS_IS_WORSE else now[field] > before[field] + slack
        if lost:
            found.append(f"{kernel} on {target}: {field} was {before[field]}, is {now[field]}")
    return sorted(found)


def unmet(meant, kernel: str, target: str, now: dict) -> list[str]:
    """Which of its declared instructions a kernel lacks.

    Args:
        meant: (pattern of kernels, pattern of targets, {"tensor_cores": True, "load": bytes, "store": bytes} at least).
    """
    return [
        f"{kernel} on {target}: {field} is {now[field]}, meant is {least}"
        for kernels, targets, wanted in meant
        if re.search(kernels, kernel) and re.fullmatch(targets, target)
        for field, least in wanted.items()
        if now[field] < least
    ]
