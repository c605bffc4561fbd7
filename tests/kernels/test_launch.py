"""`_launch.Launch` against Triton's own launcher, with a driver that loads and launches nothing.

Triton picks machine code by its arguments, so what is kept between calls must be what Triton would pick again. Kernels that
are interpreted have no machine code: the checks run in a process of their own, without TRITON_INTERPRET.
"""

import gc
import os
import subprocess
import sys
import weakref

import pytest

pytest.importorskip("triton", reason="triton is not installed")


class FakeDriver:
    """sm_90, whose kernels compile as ever; a launch is noted in `launches`."""

    launches = ()

    class utils:
        load_binary = staticmethod(lambda *args: (1, 2, 32, 0, 1024))
        unload_module = staticmethod(lambda module: None)
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.target, self.launches = GPUTarget("cuda", 90, 32), []

    def launcher_cls(self, source, metadata):
        def launch(*args):
            grid, function, hooks, kernel_args = args[:3], args[4], args[7:9], args[9:]
            self.launches.append((grid, source, function, [getattr(a, "data_ptr", lambda a=a: a)() for a in kernel_args]))
            for hook in hooks:
                if hook is not None:
                    hook(args[6])

        return launch

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def check_same_choice_as_triton(driver):
    """Addresses on and off multiples of 16, a mask and none: the same code, grid and arguments as from Triton's launcher."""
    import torch

    from fastft.kernels import _launch, lora

    T, K, R = 48, 64, 16
    memory = {d: torch.zeros(2 * T * K, dtype=d) for d in (torch.bfloat16, torch.float32)}

    def tensor(dtype, rows, columns, offset):
        return memory[dtype][offset : offset + rows * columns].view(rows, columns)

    constants = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_R": 16, "num_warps": 4, "num_stages": 1}
    scalars, keep = (T, K, (R,), K, R, K, 1, 0.5), torch.zeros(T, K // 8, dtype=torch.uint8)
    for mask in (None, keep):
        launch = _launch.Launch(lora._lora_update_kernel, 4, *scalars, DROPOUT=mask is not None, **constants)
        for offset_x, offset_a in ((0, 0), (1, 0), (0, 1), (8, 4)) * 2:
            tensors = (
                tensor(torch.bfloat16, T, K, offset_x),
                tensor(torch.float32, T, R, offset_a),
                tensor(torch.bfloat16, R, K, offset_x),
                mask,
            )
            launch(*tensors)
            compiled = lora._lora_update_kernel[(4, 1, 1)](
                *tensors, *scalars, DROPOUT=mask is not None, **constants, enable_fp_fusion=True
            )
            assert driver.launches[-2] == driver.launches[-1]
            assert any(compiled is known for known in launch.known.values())
        assert len(launch.known) == 3  # (8, 4) is aligned as (0, 0) is


def check_plans(driver):
    """One plan for calls of the same layout and another for any other; it keeps no tensor alive."""
    import torch

    from fastft.kernels import _launch, lora

    def call(rows, dtype=torch.bfloat16, stride=64):
        x, a = torch.zeros(rows, 64, dtype=dtype), torch.zeros(16, 64, dtype=dtype)
        s, mask = lora.lora_shrink(x, a, [16], 0.0, None)
        dx, y = torch.zeros(rows, 64, dtype=dtype), torch.zeros(rows, stride, dtype=dtype)[:, :64]
        ds, db = lora.lora_grad_sb(dx, s, torch.zeros(64, 16, dtype=dtype), 0.5)
        lora.lora_expand_(y, s, torch.zeros(64, 16, dtype=dtype), 0.5)
        da = lora.lora_grad_a(ds, x, a, [16], mask, 0.0)
        lora.lora_grad_x_(dx, ds, a, [16], mask, 0.0)
        return [weakref.ref(t) for t in (x, a, s, mask, dx, y, ds, db, da)]

    counts = []
    other = {"dtype": torch.float16}, {"stride": 128}  # the last one differs in y alone
    for arguments in ({"rows": 8}, {"rows": 8}, {"rows": 9}, *({"rows": 8} | o for o in other)):
        held = call(**arguments)
        gc.collect()
        assert all(ref() is None for ref in held)
        counts.append(len(_launch._plans))
    assert counts == [5, 5, 10, 15, 16]


def check_hooks(driver):
    """Triton's profiler is told of launches of kept kernels too."""
    import torch
    import triton

    from fastft.kernels import _launch

    told = []
    total = _launch.Sum(3, (5, 7), torch.float32)
    parts = torch.zeros(total.workspace)
    total(parts)
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: told.append(metadata.get()["name"]))
    total(parts)
    assert told == ["_sum_slabs_kernel"]


@pytest.mark.parametrize("check", ["check_same_choice_as_triton", "check_plans", "check_hooks"])
def test_launch(check):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_launch", check]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    import triton.runtime

    fake = FakeDriver()
    triton.runtime.driver.set_active(fake)
    globals()[sys.argv[1]](fake)
