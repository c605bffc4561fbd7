"""Several processes on a CPU, started as users start them: DistributedDataParallel and fully_shard."""

from .processes import run_cases


def test_distributed_data_parallel_and_fully_shard(tmp_path):
    assert run_cases(tmp_path, "cases_ddp.py", "cases_fsdp.py") >= 60  # in one launch: most of the time is importing
