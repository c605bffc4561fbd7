"""Several processes on a CPU, started as users start them: DistributedDataParallel and fully_shard."""

import torch

import fastft

from .processes import run_cases
from .ranks import accelerated


def test_distributed_data_parallel_and_fully_shard(tmp_path):
    assert run_cases(tmp_path, "cases_ddp.py", "cases_fsdp.py") >= 90  # in one launch: most of the time is importing


def test_what_zero_partitioned_is_left_to_peft():
    """Stage 3 leaves empty tensors, which the modules that hold them gather when they are called."""
    model = accelerated().model
    q, k = (model.base_model.model.model.layers[0].self_attn.get_submodule(name) for name in ("q_proj", "k_proj"))
    q.lora_A["default"].weight.data = torch.empty(0)
    k.base_layer.weight.data = torch.empty(0)
    rows = {
        row.name.rsplit(".", 1)[-1]: (row.path, row.reason) for row in fastft.report(model) if ".layers.0.self" in row.name
    }
    assert rows["q_proj"] == ("peft", "lora_A is [0], lora_B [16, 4], the input [..., 16]")
    assert rows["v_proj"] == ("fused", "")
    path, reason = rows["k_proj"]
    assert path == "low-rank part" and reason.startswith("the base weight is [0]")
