"""What ptxas gave each CUDA kernel, from the built library: registers, stack, shared memory per architecture.

python -m tests.cuda.resources --write    rewrites csrc/cuda/resources.json, which test_cuda_build.py compares with
"""

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path

from fastft import _native

LIBRARY = _native.LIB / "libfastft_cuda.so"
TABLE = Path(__file__).parents[2] / "csrc" / "cuda" / "resources.json"


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
    """{architecture: {kernel: {"registers", "stack", "local", "shared"}}}; shared is static (1024: the system's)."""
    table, kernels, name = {}, None, None
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (\S+)", line):
            kernels = table.setdefault(match.group(1), {})
        elif match := re.search(r"Function (\S+):", line):
            name = kernel_name(match.group(1))
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            kernels[name] = {"registers": registers, "stack": stack, "local": local, "shared": shared}
    return {arch: dict(sorted(kernels.items())) for arch, kernels in sorted(table.items()) if kernels}


def sass(architecture):
    """{kernel: its machine code as text} for one architecture."""
    parts = re.split(r"Function : (\S+)", cuobjdump("-sass", "-arch", architecture))
    return {kernel_name(name): code for name, code in zip(parts[1::2], parts[2::2])}


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
