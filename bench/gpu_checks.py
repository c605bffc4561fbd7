"""The parts of ``bench/gpu.sh`` that are Python: sanitizer verdicts, the CUDA-graph check, the summary.

``link-packages`` runs before fastft is importable, so this file imports the package only where it needs it.
"""

import argparse
import json
import re
import sys
import sysconfig
from pathlib import Path

REFUSALS = ("Device not supported", "device is not supported", "Unable to find injection", "Failed to initialize")


def link_packages(folders: list[str]) -> Path:
    """Let this environment see the packages in these folders, the first before the second, its own before all."""
    path = Path(sysconfig.get_path("purelib")) / "gpu-sh-parent.pth"
    path.write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders))
    return path


def sanitizer_verdict(log: str, output: str, status: int) -> dict[str, str]:
    """What one compute-sanitizer run showed: ``passed``, ``failed``, or ``skipped`` where the device refuses the tool.

    Args:
        log: the tool's log, output: what pytest printed, status: the exit status of the whole.
    """
    refused = [line.strip() for line in (log + "\n" + output).splitlines() if any(r in line for r in REFUSALS)]
    if refused:
        return {"verdict": "skipped", "message": refused[0]}
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) .*", log)
    passed = re.search(r"(\d+) passed", output)
    if not summaries:
        return {"verdict": "failed", "message": "the log holds no ERROR SUMMARY: the tool did not finish"}
    if any(int(count) for count in summaries):
        return {"verdict": "failed", "message": f"{sum(map(int, summaries))} errors"}
    if status or not passed:
        return {
            "verdict": "failed",
            "message": f"no errors seen, but the tests ended with status {status}, {passed and passed[0]}",
        }
    return {"verdict": "passed", "message": f"0 errors, {passed[0]}"}


def cuda_graph(step):
    """Capture `step` in a CUDA graph; returns a function that replays it and gives copies of its outputs."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay():
        graph.replay()
        return {name: t.clone() for name, t in outputs.items()}

    return replay


def check_graph(device, capture, seed: int = 7) -> list[str]:
    """What is wrong with a captured LoRA layer; empty if nothing.

    Without dropout and, from the same seed, with it, a replay must give eager's y, dX, dA and dB, also after its input
    was overwritten in place. Two replays must draw different masks.
    """
    import torch

    from fastft.bench import shapes
    from fastft.bench.ops import lora
    from fastft.bench.runner import relative_error

    faults = []
    for p in (0.0, 0.1):
        d = lora.make_inputs(shapes.LINEARS["tiny"], "fp32", shapes.RANK, p, device, seed=0)
        step = lora.adapted(lora.ours)(d)
        replay = capture(step)
        for what in ("first input", "overwritten input"):
            torch.manual_seed(seed)
            eager = step()
            torch.manual_seed(seed)
            replayed = replay()
            for name, want in eager.items():
                error = relative_error(replayed[name], want)
                if not error <= 1e-5:
                    faults.append(f"p={p}, {what}: {name} of the replay differs from eager's by {error:.1e}")
            if p > 0 and torch.equal(replay()["y"], replayed["y"]):
                faults.append(f"p={p}, {what}: two replays used the same dropout mask")
            with torch.no_grad():
                d.x.copy_(d.x.flip(0) * 2)
    return faults


def check_grouped_graph(device, capture) -> list[str]:
    """What is wrong with a captured layer whose rows name their adapters; empty if nothing.

    One capture must serve every number of adapters up to its capacity, and none, after segments and inputs were overwritten
    in place: its y are eager's.
    """
    import torch

    from fastft.bench import shapes
    from fastft.bench.ops import grouped
    from fastft.bench.runner import relative_error

    faults, capacity, tokens = [], 4, 12
    d = grouped.make_inputs(shapes.MODELS["tiny-llama"], "fp32", capacity, tokens, 4, device, seed=0)
    step, base = grouped.each_site(grouped.ours)(d), grouped.each_site(grouped.frozen)(d)
    replay = capture(step)
    for active in (capacity, 1, 0, 2, capacity):
        bounds = [tokens * e // active for e in range(active + 1)] if active else []
        rows = [[e, *bounds[e : e + 2]] if e < active else [0, 0, 0] for e in range(capacity)]
        d.segments.copy_(torch.tensor(rows, dtype=torch.int32))
        for x in d.x:
            x.copy_(x.flip(0) * 1.5)
        eager, replayed, bare = step(), replay(), base()
        for name, want in eager.items():
            error = relative_error(replayed[name], want)
            if not error <= 1e-5:
                faults.append(f"{active} adapters: {name} of the replay differs from eager's by {error:.1e}")
            if (relative_error(want, bare[name]) > 1e-5) != (active > 0):
                faults.append(f"{active} adapters: {name} {'lacks' if active else 'has'} what adapters add")
    return faults


def graph_faults() -> list[str]:
    """`check_graph` and `check_grouped_graph` on every backend of the GPU."""
    import torch

    from fastft import testing

    torch.cuda.init()
    faults = []
    for backend in testing.available("cuda"):
        if backend != "reference":
            with testing.use(backend):
                for check in (check_graph, check_grouped_graph):
                    faults += [f"{backend}: {fault}" for fault in check("cuda", cuda_graph)]
            print(f"graph replay on {backend}: {'FAILED' if faults else 'ok'}")
    return faults


def summary(out: Path) -> dict:
    """What the stages left in `out`, as one dictionary."""
    from fastft.bench import results

    stages = {}
    for log in sorted(out.glob("*.log")):
        done, failed = log.with_suffix(".done"), log.with_suffix(".failed")
        if done.exists() or failed.exists():
            stages[log.stem] = (
                f"done in {done.read_text().strip()}" if done.exists() else f"failed: {failed.read_text().strip()}"
            )
    rows = results.read(sorted(out.glob("results/*.csv")))
    timed = [row for row in rows if row["metric"] == "time"]
    return {
        "stages": stages,
        "sanitizer": {path.stem.removeprefix("sanitize-"): _json(path) for path in sorted(out.glob("sanitize-*.json"))},
        "graph": _json(out / "graph.json"),
        "proof": _json(out / "proof.json"),
        "csv": [str(path.relative_to(out)) for path in sorted([*out.glob("results/*.csv"), *out.glob("op-times.csv")])],
        "configs": [str(path.relative_to(out)) for path in sorted(out.glob("configs/*/*.json"))],
        "rows": {status: sum(row["status"] == status for row in timed) for status in sorted({r["status"] for r in timed})},
        "logs": [path.name for path in sorted(out.glob("*.log"))],
    }


def _json(path: Path):
    return json.loads(path.read_text()) if path.exists() else None


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("link-packages").add_argument("folders", nargs="+")
    for name in ("sanitizer", "no-sanitizer", "graph", "collect"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True)
        if name == "sanitizer":
            command.add_argument("tool")
            command.add_argument("--status", type=int, required=True)
    args = parser.parse_args(argv)

    if args.command == "link-packages":
        print(link_packages(args.folders))
        return 0
    if args.command == "sanitizer":
        stem = args.out / f"sanitize-{args.tool}"
        log, output = (stem.with_suffix(s) for s in (".log", ".txt"))
        texts = [path.read_text(errors="replace") if path.exists() else "" for path in (log, output)]
        found = sanitizer_verdict(*texts, args.status)
        failed, where = found["verdict"] == "failed", stem.with_suffix(".json")
    elif args.command == "no-sanitizer":
        found = {"verdict": "skipped", "message": "compute-sanitizer is not on the PATH"}
        failed, where = False, args.out / "sanitize-all.json"
    elif args.command == "graph":
        faults = graph_faults()
        found, failed, where = {"faults": faults}, bool(faults), args.out / "graph.json"
    else:
        found, failed, where = summary(args.out), False, args.out / "summary.json"
    text = json.dumps(found, indent=2)
    print(text)
    where.write_text(text + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
