"""Run files of cases in several processes: torchrun starts pytest on the same files in each, on CPU with gloo.

A case is a test in a file `cases_*.py` (which pytest does not collect by itself) that takes the fixture `rank` of `ranks`;
all ranks go through the same cases in the same order.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 120  # of a whole launch: the processes import everything on whatever cores are left


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
