"""The built CUDA library, read without a GPU: architectures, spills, registers, the machine code of inline PTX, loading."""

import json
import os
import subprocess
import sys

import pytest

from fastft.ops import registry
from tests import golden
from tests.cuda import resources
from tests.test_matrix import EXCEPTIONS

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


@pytest.fixture(scope="module", autouse=True)
def built():
    if not resources.LIBRARY.exists():
        pytest.skip(f"{resources.LIBRARY.name} is not built (nvcc was not found, or FASTFT_CUDA=0)")


@pytest.fixture(scope="module")
def usage():
    if resources.find_tool("cuobjdump") is None:
        pytest.skip("no cuobjdump (neither in a CUDA toolkit nor in triton)")
    return resources.usage()


def test_machine_code_for_every_architecture(usage):
    assert set(usage) == set(ARCHITECTURES)
    assert len({tuple(kernels) for kernels in usage.values()}) == 1, "the same kernels for every architecture"
    assert "sm_80.ptx" in resources.cuobjdump("--list-ptx"), "PTX for GPUs without machine code here"


def test_no_kernel_spills(usage):
    spilled = {(arch, k): v for arch, kernels in usage.items() for k, v in kernels.items() if v["stack"] or v["local"]}
    assert not spilled


def test_no_kernel_is_worse_than_the_committed_table_or_lacks_what_it_is_meant_to_have(usage):
    problems = resources.problems(usage, json.loads(resources.TABLE.read_text()))
    assert not problems, "\n".join([*problems, resources.REWRITE])


def test_what_is_worse_or_lacking_is_told():
    table = json.loads(resources.TABLE.read_text())
    assert resources.problems(table, table) == []
    changed = json.loads(json.dumps(table))
    arch, kernel = "sm_90a", "expand_kernel<BFloat16, 1>"
    changed[arch][kernel] |= {"registers": 255, "tensor_cores": False, "store": 4}
    changed["sm_80"]["new_kernel<float>"] = changed["sm_80"].pop("copy_kernel<float>")
    before = table[arch][kernel]["registers"]
    assert sorted(resources.problems(changed, table)) == [
        "copy_kernel<float> on sm_80: gone",
        f"{kernel} on {arch}: registers was {before}, is 255",
        f"{kernel} on {arch}: store is 4, meant is 16",
        f"{kernel} on {arch}: store was 16, is 4",
        f"{kernel} on {arch}: tensor_cores is False, meant is True",
        f"{kernel} on {arch}: tensor_cores was True, is False",
        "new_kernel<float> on sm_80: not in the table",
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inline_ptx_became_the_wanted_instruction(usage, architecture):
    """ptx::load_once is a 16-byte read-only load that L1 does not keep, in every kernel that streams activations."""
    streaming = {
        k: code
        for k, code in resources.sass(architecture).items()
        if k.startswith(("shrink", "grad_sb", "grad_a", "dora_grad_y"))
    }
    assert len(streaming) == 48
    for kernel, code in streaming.items():
        assert "LDG.E.NA.128.CONSTANT" in code, kernel
        assert "LDL" not in code and "STL" not in code, f"{kernel} uses local memory"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_move_16_bytes_at_a_time(usage, architecture):
    """What belongs to a slice, whatever the length of its rows, and rows of a weight: beside four float32 of a delta go 8
    bytes of a 16-bit weight. Its columns lie apart.
    """
    slices = {k: code for k, code in resources.sass(architecture).items() if k.startswith(("write_slice", "slice_adamw"))}
    assert len(slices) == 18
    for kernel, code in slices.items():
        adamw, (dtype, dim, *delta) = kernel.startswith("slice_adamw"), kernel.partition("<")[2].rstrip(">").split(", ")
        assert "LDG.E.NA.128.CONSTANT" in code and code.count("LDG.E.128") >= 3 * adamw, kernel
        assert code.count("STG.E.128") >= 3 * adamw, kernel
        if dim == "0":
            wide = dtype == "float" or delta == ["0"]
            assert code.count("STG.E.128") > 3 * adamw if wide else "STG.E.64" in code, kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_entries_move_16_bytes_at_a_time(usage, architecture):
    """What belongs to the entries; the weight is touched an entry at a time. Token vectors; asynchronous copies of tiles."""
    entries = {
        k: code for k, code in resources.sass(architecture).items() if k.startswith(("s", "write_entries", "add_many"))
    }
    updates = {k: code for k, code in entries.items() if k.startswith(("sparse_adamw", "sparse_maxima"))}
    assert len(updates) == 15
    for kernel, code in updates.items():
        narrow = kernel.startswith("sparse_adamw") and ", 1, " in kernel
        moments = 0 if narrow or kernel.startswith("sparse_maxima") else 2
        assert "LDG.E.NA.128.CONSTANT" in code and code.count("LDG.E.128") >= 1 + moments, kernel
        assert code.count("STG.E.128") >= 1 + moments and (not narrow or code.count("STG.E.64") >= 2), kernel
    for kernel, code in entries.items():
        if kernel.startswith(("sampled_entries", "add_many")):
            assert code.count("LDG.E.128") >= 4, kernel
        if kernel.startswith("sampled_tiles"):
            assert "LDGSTS.E.BYPASS.128" in code and "LDGDEPBAR" in code, kernel
            instruction = "HMMA.16816.F32.BF16" if "BFloat16" in kernel else "HMMA.16816.F32"
            assert ("HMMA" in code) == (instruction in code) == ("LDSM" in code) == ("float" not in kernel), kernel
        assert ("ATOM" not in code and "RED.E" not in code) or kernel.startswith("sparse_maxima"), kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_of_16_bit_operands_run_on_tensor_cores(usage, architecture):
    """Kernels named <type, ..., parts> (`Arithmetic` in tile.cuh): 0 parts are float32 arithmetic, 1 and 3 tensor cores."""
    products = {
        k: code
        for k, code in resources.sass(architecture).items()
        if k.startswith(("shrink", "expand", "grad", "dora_expand"))
    }
    assert len(products) == 60
    for kernel, code in products.items():
        instruction = "HMMA.16816.F32.BF16" if "BFloat16" in kernel else "HMMA.16816.F32"
        tensor_cores = not kernel.endswith(", 0>")
        assert tensor_cores or "BFloat16" not in kernel, kernel
        assert ("HMMA" in code) == (instruction in code) == ("LDSM" in code) == tensor_cores, kernel


def test_library_loads_and_registers_all_ops(tmp_path):
    """With a stand-in for torch's CUDA library, as on a machine that has one: every symbol resolves, every op is there."""
    source = tmp_path / "stand_in.cpp"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }')
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", tmp_path / "libtorch_cuda.so"], check=True)
    without = {op for op, backend in EXCEPTIONS if backend == "cuda"}
    code = (
        "import os, sys, ctypes, torch; from fastft.ops import dora, grouped, lora, partial, registry, selection, sparse\n"
        f"library = ctypes.CDLL({str(resources.LIBRARY)!r}, mode=os.RTLD_NOW)\n"
        "library.fastft_cuda_obstacle.restype = ctypes.c_char_p\n"
        "print(library.fastft_cuda_obstacle())\n"
        "registry.define_native('fastft_cuda')\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"wanted = registry.OPS.keys() - {without!r}\n"
        "missing = [name for name in wanted if not has(f'fastft_cuda::{name}', 'CUDA')]\n"
        "sys.exit(str(missing) if missing or len(registry.OPS) < 24 else 0)"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(resources.TABLE.parents[2])}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    if not os.path.exists("/dev/nvidiactl"):
        assert "driver version is insufficient" in process.stdout or "no CUDA-capable device" in process.stdout
    for name in registry.OPS.keys() - without:
        golden.prove(name, "cuda", f"compiled for {', '.join(ARCHITECTURES)}")
