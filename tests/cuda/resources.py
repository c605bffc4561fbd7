"""What ptxas made of each CUDA kernel, from the built library: registers, stack, shared memory, tensor-core instructions and
the widest accesses per architecture.

python -m tests.cuda.resources --write    rewrites csrc/cuda/resources.json, which test_cuda_build.py compares with
"""

import argparse
import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

from fastft import _native
from tests import machine_code

LIBRARY = _native.LIB / "libfastft_cuda.so"
TABLE = Path(__file__).parents[2] / "csrc" / "cuda" / "resources.json"
REWRITE = "on purpose? Rewrite csrc/cuda/resources.json: python -m tests.cuda.resources --write, and say in the commit why"

# What kernels are meant to have: (pattern of names, pattern of architectures, at least). Of names <type, ..., parts> 0 parts
# are float32 arithmetic, 1 and 3 tensor cores (`Arithmetic` in tile.cuh). What moves single columns, or sums parts that lie
# together across a warp, is not meant to be wide.
_ANY, _WIDE, _LOADS = ".*", {"load": 16, "store": 16}, {"load": 16}
MEANT = (
    (r"^(shrink|expand|grad_a|grad_sb|grad_x|dora_expand)_kernel<.*, [13]>$", _ANY, {"tensor_cores": True}),
    (r"^grouped_(shrink|expand|outer)_kernel<.*, [13]>$", _ANY, {"tensor_cores": True}),
    (r"^sampled_tiles_kernel<(BFloat16|Half), ", _ANY, {"tensor_cores": True}),
    (r"^(expand|grad_x|dora_expand|dora_grad_y|grouped_expand|grouped_outer|transpose)_kernel<", _ANY, _WIDE),
    (r"^(slice_adamw|sparse_adamw|sparse_maxima)_kernel<", _ANY, _WIDE),
    (r"^write_slice_kernel<(\w+, 0, 0|float, 0, 1)>$", _ANY, _WIDE),
    (r"^(shrink|grad_a|grad_sb|grouped_shrink|write_slice|write_entries|gather_entries)_kernel<", _ANY, _LOADS),
    (r"^(sampled_entries|sampled_tiles|add_many|count_bins|count_at_least|take_at_least)_kernel<", _ANY, _LOADS),
)


def find_tool(name):
    """Path of a CUDA binary tool: on PATH, in a toolkit, or the copy that triton brings; None if there is none."""
    places = [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name))
    except ImportError:
        pass
    return next((place for place in places if place and Path(place).exists()), None)


def cuobjdump(*options):
    return subprocess.run(
        [find_tool("cuobjdump"), *options, str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout


def kernel_name(mangled):
    """`shrink_kernel<BFloat16, 16>` of a mangled name (the mangled one also holds a hash of the source's path)."""
    name, arguments = re.search(r"\d([a-z_]+_kernel)I(.*?)E+v", mangled).groups()
    dtype = re.search(r"BFloat16|Half|$", arguments).group() or "float"
    return f"{name}<{', '.join([dtype, *re.findall(r'L[ib]([0-9]+)', arguments)])}>"


def usage():
    """{architecture: {kernel: {"registers", "stack", "local", "shared"} and what `machine_code.seen` tells}}; shared is
    static (1024: the system's)."""
    table, kernels, name = {}, None, None
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (\S+)", line):
            kernels = table.setdefault(match.group(1), {})
        elif match := re.search(r"Function (\S+):", line):
            name = kernel_name(match.group(1))
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            kernels[name] = {"registers": registers, "stack": stack, "local": local, "shared": shared}
    found = {}
    for arch, kernels in sorted(table.items()):
        if kernels:
            code = sass(arch)
            found[arch] = {kernel: row | machine_code.seen(code[kernel]) for kernel, row in sorted(kernels.items())}
    return found


@functools.cache
def sass(architecture):
    """{kernel: its machine code as text} for one architecture, of the library that was there when first asked."""
    parts = re.split(r"Function : (\S+)", cuobjdump("-sass", "-arch", architecture))
    return {kernel_name(name): code for name, code in zip(parts[1::2], parts[2::2])}


def problems(now, table):
    """What became worse than in the committed table, is not in it, or lacks what is meant; empty if nothing."""
    found = [
        f"no kernel is like {p}: MEANT" for p, *_ in MEANT if not any(re.search(p, k) for ks in now.values() for k in ks)
    ]
    for arch in sorted(now.keys() | table.keys()):
        kernels, kept = now.get(arch, {}), table.get(arch, {})
        found += [f"{k} on {arch}: {'not in the table' if k in kernels else 'gone'}" for k in kernels.keys() ^ kept.keys()]
        for kernel, row in kernels.items():
            found += machine_code.worse(kernel, arch, kept.get(kernel, {}), row)
            found += machine_code.unmet(MEANT, kernel, arch, row)
    return found


def as_text(table):
    """JSON with a line per kernel."""
    architectures = []
    for architecture, kernels in table.items():
        rows = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in kernels.items())
        architectures.append(f" {json.dumps(architecture)}: {{\n{rows}\n }}")
    return "{\n" + ",\n".join(architectures) + "\n}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE}")
    text = as_text(usage())
    if parser.parse_args().write:
        TABLE.write_text(text)
    else:
        print(text)
