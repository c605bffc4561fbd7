"""Run functions (`results`) or files of cases (`run_cases`) in several processes, on CPU with gloo.

For files torchrun starts pytest on the same ones in each process. A case is a test in a file `cases_*.py` (which pytest does
not collect by itself) that takes the fixture `rank` of `ranks`; all ranks go through the same cases in the same order.
"""

import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[2]
SECONDS = 300  # of a whole launch: the processes import everything on whatever cores are left, 70 s if those are free


def launch(folder, *arguments, processes=2, environment=()):
    """`torchrun --nproc-per-node PROCESSES ARGUMENTS` on a free port; the stdout of each rank. Fails where a rank does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--redirects", "3", "--log-dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FASTFT_STRICT": "1", **dict(environment)}
    process = subprocess.Popen(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        # torchrun passes SIGTERM on to its ranks, and kills those that don't end.
        process.terminate()
        said, _ = process.communicate()
        said += f"\nnot done after {SECONDS} s"
    outputs = {
        name: [path.read_text() for path in sorted(Path(folder).glob(f"*/attempt_0/*/{name}.log"))]
        for name in ("stdout", "stderr")
    }
    assert process.returncode == 0, "\n".join([said[-2000:], *(o[-6000:] for o in (*outputs["stderr"], *outputs["stdout"]))])
    assert len(outputs["stdout"]) == processes, said
    return outputs["stdout"]


def results(folder, job):
    """What ``job(rank)``, a function of a module, gave in each of two processes with a process group, through files in
    `folder`."""
    processes = mp.spawn(_worker, (job, str(folder)), nprocs=2, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < end, "the processes hang"
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _worker(rank, job, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS))
    torch.save(job(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_cases(folder, *files, processes=2):
    """Run files of cases in every rank. Each must pass the same cases, at least one, and skip none; their number."""
    files = [f"tests/integrations/{name}" for name in files]
    outputs = launch(
        folder,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.integrations.ranks",
        *files,
        processes=processes,
    )
    summaries = [output.strip().splitlines()[-1] for output in outputs]
    passed = {re.match(r"\d+ passed", summary) and int(summary.split()[0]) for summary in summaries}
    assert len(passed) == 1 and None not in passed, summaries
    assert not any(word in summary for summary in summaries for word in ("skipped", "deselected")), summaries
    return passed.pop()
