"""Many adapters on disk, few in memory, through the whole server: what loading costs those who are being answered.

`fastft serve` serves a small Llama in a process of its own. Streaming clients send it requests whose adapters follow Zipf's
law; most adapters have to be loaded first, while others' tokens are produced. In turn with that, in blocks of some seconds,
the same trace is sent with every adapter's number folded onto those that are in memory, so that nothing is loaded. Compared
is the 99th percentile of the time between two tokens of an answer, on the clients' side.

Every token is checked afterwards: on the plain model with its adapter's dense delta added, its logit may lie at most
`WRONG` below the largest one. ``python -m fastft.bench.serve_trace`` prints a table and keeps rows in bench/results.
"""

import argparse
import copy
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastft.ops import registry

from . import results, served, shapes, stats
from .clients import BASE, NEW, PROMPT, Answer, Block, Server, Trace, drive, save_tokenizer
from .e2e import step

SHAPE, RANK, LINEARS = "llama-8l", 8, ("q_proj", "v_proj")
SECONDS, TARGET, WRONG = 60.0, 2.0, 1e-3
SHARPER = 3.0  # by how much weights are larger than usual: then tokens depend on what was asked and on the adapter
WARM_SECONDS, SWAPPED = 5.0, 100


@dataclass(frozen=True)
class Pair:
    """Neighbouring blocks: with loads, and with resident adapters alone."""

    loads: Block
    resident: Block


def answers(pairs: list[Pair]) -> list[Answer]:
    return [answer for pair in pairs for block in (pair.loads, pair.resident) for answer in block.answers]


def make_files(folder: Path, shape: shapes.Model, adapters: int, seed: int = 0) -> tuple[Path, Path]:
    """(model folder, folder of adapters a0, a1, …); the adapters' tensors are bfloat16."""
    model_folder, adapter_folder = folder / "model", folder / "adapters"
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = step.make_model(replace(shape, length=4 * (PROMPT[1] + NEW[1])), torch.float32, torch.device("cpu"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(SHARPER)
        for config in (model.config, model.generation_config):
            config.bos_token_id = config.eos_token_id = config.pad_token_id = None  # answers are as long as asked for
        model.save_pretrained(model_folder)
        save_tokenizer(model_folder, shape.vocab)
        for i in range(adapters):
            std = SHARPER * served.STD
            served.make_lora(model, adapter_folder / f"a{i}", RANK, LINEARS, torch.bfloat16, std)
    return model_folder, adapter_folder


def measure(server: Server, trace: Trace, pairs: int, seconds: float, clients: int) -> list[Pair]:
    """Pairs of blocks of so many seconds, the first of them with and without loads in turn."""
    found, first = [], 0
    for i in range(pairs):
        blocks = {}
        for arm in ("loads", "resident") if i % 2 == 0 else ("resident", "loads"):
            there = server.residents()
            names = {"loads": lambda n: f"a{n}", "resident": lambda n, there=there: there[n % len(there)]}
            before = server.stats()
            block = drive(server.url, trace, first, names[arm], arm, seconds, clients)
            blocks[arm] = replace(block, stats={key: n - before[key] for key, n in server.stats().items()})
        found.append(Pair(**blocks))
        first += max(len(block.answers) for block in blocks.values())
    return found


@torch.no_grad()
def count_wrong(model_folder: Path, adapter_folder: Path, given: list[Answer], together: int = 16) -> list[int]:
    """Of each complete answer, how many tokens are not those of the model with its adapter."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    pristine = copy.deepcopy(model.state_dict())
    by_model: dict[str, list[int]] = {}
    for i, answer in enumerate(given):
        by_model.setdefault(answer.model, []).append(i)
    wrong = [0] * len(given)
    for name, own in by_model.items():
        deltas = {} if name == BASE else served.read_lora(adapter_folder / name, "cpu", torch.float64)
        for linear, (a, b) in deltas.items():
            weight = model.get_submodule(linear).weight
            weight.copy_(pristine[f"{linear}.weight"] + (b @ a).float())
        own.sort(key=lambda i: len(given[i].prompt) + given[i].new)
        for at in range(0, len(own), together):
            batch = own[at : at + together]
            for i, gaps in zip(batch, _gaps(model, [given[i] for i in batch]), strict=True):
                wrong[i] = int((~(gaps <= WRONG)).sum())
        for linear in deltas:
            model.get_submodule(linear).weight.copy_(pristine[f"{linear}.weight"])
    return wrong


def _gaps(model, given: list[Answer]) -> list[torch.Tensor]:
    """By how much each token's logit lies below the largest one. Padding follows after the tokens, which don't see it."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(answer.prompt + answer.tokens[:-1]) for answer in given], batch_first=True
    )
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    spans = [(len(answer.prompt) - 1, len(answer.prompt) - 1 + len(answer.tokens)) for answer in given]
    logits = model.lm_head(torch.cat([rows[begin:end] for rows, (begin, end) in zip(hidden, spans)]))
    chosen = torch.tensor([token for answer in given for token in answer.tokens])
    gaps = logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]
    return list(gaps.split([len(answer.tokens) for answer in given]))


def swapped(given: list[Answer], names: list[str]) -> list[Answer]:
    """Some of the answers as if another adapter had been asked: nearly all of them are to be found wrong."""
    draw = random.Random(0)
    some = draw.sample(given, min(SWAPPED, len(given)))
    return [replace(one, model=draw.choice([name for name in names if name != one.model])) for one in some]


@dataclass(frozen=True)
class Report:
    """What was measured; `caught`: of the answers that another adapter would have given, the share that the check saw."""

    pairs: list[Pair]
    wrong: int
    caught: float
    ratio: stats.Interval

    @property
    def errors(self) -> list[str]:
        return [answer.error for answer in answers(self.pairs) if answer.error]

    @property
    def status(self) -> str:
        if self.wrong or self.errors:
            return "wrong"
        compared = self.moved("resident", "loads_total") == 0 < self.moved("loads", "loads_total")
        return "ok" if compared else "void"

    def blocks(self, arm: str) -> list[Block]:
        return [getattr(pair, arm) for pair in self.pairs]

    def moved(self, arm: str, counter: str) -> int:
        return sum(block.stats[counter] for block in self.blocks(arm))

    def numbers(self, arm: str) -> dict[str, tuple[float, str]]:
        """Metric -> (value, unit)."""
        blocks = self.blocks(arm)
        seconds = sum(block.end - block.begin for block in blocks)
        gaps, firsts = ([t for block in blocks for t in getattr(block, kind)()] for kind in ("gaps", "first_tokens"))
        found = {"requests": (sum(len(block.answers) for block in blocks), "")}
        for name, times in (("inter_token", gaps), ("first_token", firsts)):
            for percent in (50, 99):
                found[f"{name}_p{percent}"] = float(torch.tensor(times).quantile(percent / 100)), "s"
        found["tokens_per_second"] = sum(block.tokens() for block in blocks) / seconds, "1/s"
        found["client_load"] = sum(block.client_seconds for block in blocks) / seconds, "cores"
        for counter in ("loads", "reads", "evictions"):
            found[counter] = self.moved(arm, f"{counter}_total"), ""
        return found


def run(
    folder: Path, shape: shapes.Model, *, adapters, slots, threads, seconds, block, clients, host_memory, seed=0
) -> Report:
    """Make the files, serve, measure blocks of `block` seconds for `seconds` with loads and as many without, and check."""
    model_folder, adapter_folder = make_files(folder, shape, adapters, seed)
    trace = Trace(adapters, shape.vocab, seed)
    memory = {"slots": slots, "threads": threads, "host_memory": host_memory}
    with Server(folder, model_folder, adapter_folder, **memory) as server:
        warm = min(WARM_SECONDS, seconds)
        drive(server.url, Trace(adapters, shape.vocab, seed + 1), 0, lambda n: f"a{n}", "warm", warm, clients)
        pairs = measure(server, trace, max(1, round(seconds / block)), block, clients)
    whole = [answer for answer in answers(pairs) if not answer.error]
    wrong = sum(count_wrong(model_folder, adapter_folder, whole))
    names = [BASE, *(f"a{i}" for i in range(adapters))]
    seen = count_wrong(model_folder, adapter_folder, swapped(whole, names))
    arms = ([getattr(pair, arm).gaps() for pair in pairs] for arm in ("loads", "resident"))
    return Report(pairs, wrong, sum(map(bool, seen)) / len(seen), stats.pooled_ratio(*arms, 0.99))


def rows(report: Report, env: dict[str, str], shape: str, case: str, size: str, status: str) -> list[dict[str, str]]:
    """Rows of the results' columns: `fastft` with loads, `floor` without."""
    ran = next(name for name in registry.ORDER["cpu"] if registry.OPS["grouped_expand_"].missing(name, "cpu") is None)
    same = env | {"family": "serve_trace", "case": case, "shape": shape, "size": size, "dtype": "fp32", "status": status}
    same |= {"rounds": len(report.pairs), "backend": ran}
    found = []
    for implementation, arm in (("fastft", "loads"), ("floor", "resident")):
        own = same | {"implementation": implementation}
        for metric, (value, unit) in report.numbers(arm).items():
            found.append(own | {"metric": metric, "value": f"{value:.6g}", "unit": unit})
    ours = {row["metric"]: row for row in found if row["implementation"] == "fastft"}
    ratio = report.ratio
    ours["inter_token_p99"] |= {"ratio": f"{ratio.median:.5f}", "lo": f"{ratio.lo:.5f}", "hi": f"{ratio.hi:.5f}"}
    ours["inter_token_p99"] |= {"target": TARGET, "met": int(ratio.hi <= TARGET)}
    for metric, value in (("wrong_tokens", report.wrong), ("errors", len(report.errors))):
        row = {"implementation": "fastft", "metric": metric, "value": value, "target": 0, "met": int(not value)}
        found.append(same | row)
    return found


def show(report: Report, title: str) -> None:
    with_loads, without = report.numbers("loads"), report.numbers("resident")
    lines = [("", "with loads", "without", "")]
    for metric, (value, unit) in with_loads.items():
        scale, shown = (1e3, "ms") if unit == "s" else (1, unit)
        lines.append((metric, f"{scale * value:.4g}", f"{scale * without[metric][0]:.4g}", shown))
    results.show(title, lines)
    blocks = "  ".join(f"{1e3 * p99(p.loads):.1f}/{1e3 * p99(p.resident):.1f}" for p in report.pairs)
    print(f"p99 between tokens by block, ms with/without loads: {blocks}")
    print(f"p99 with loads over p99 without: {report.ratio}, target {TARGET}")
    asked, errors = len(answers(report.pairs)), report.errors
    print(f"wrong tokens: {report.wrong} in {asked - len(errors)} answers; errors: {len(errors)} {errors[:3] or ''}")
    print(f"of answers checked against another adapter, {100 * report.caught:.0f} % are found wrong")


def p99(block: Block) -> float:
    return float(torch.tensor(block.gaps()).quantile(0.99))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastft.bench.serve_trace", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="with loads; as many without (%(default)s)")
    parser.add_argument("--block", type=float, default=5.0, help="seconds of a block (%(default)s)")
    parser.add_argument("--adapters", type=int, default=1000, help="on disk (%(default)s)")
    parser.add_argument("--slots", type=int, default=64, help="adapters in memory (%(default)s)")
    parser.add_argument("--host-memory", default="1MiB", help="for adapters beside those, as `fastft serve` has it: the "
                        "default keeps none, so that each load reads the disk (%(default)s)")  # fmt: skip
    parser.add_argument("--clients", type=int, default=16, help="requests at a time (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the server (%(default)s); OMP_NUM_THREADS: of the check")
    parser.add_argument("--out", metavar="DIR", help="folder of the CSV (default: bench/results of a checkout)")
    args = parser.parse_args(argv)
    shape = shapes.MODELS[SHAPE]
    case = f"{args.adapters:,} adapters on disk, {args.slots} in memory, {args.clients} clients"
    size = f"{shape.layers} layers, r={RANK} on q, v, {args.seconds:g} s"
    env = results.environment("cpu") | {"threads": str(args.threads)}
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as folder:
        report = run(
            Path(folder), shape, adapters=args.adapters, slots=args.slots, threads=args.threads, seconds=args.seconds,
            block=args.block, clients=args.clients, host_memory=args.host_memory,
        )  # fmt: skip
    quick = args.seconds < SECONDS
    status = "quick" if quick and report.status == "ok" else report.status
    show(report, f"{SHAPE}, {case}, host memory {args.host_memory} ({status})")
    path = None if quick and not args.out else results.csv_path(env["device"], args.out)
    if path:
        results.append(path, rows(report, env, SHAPE, case, size, status))
        print(f"rows in {path}")
    return int(bool(report.wrong or report.errors))


if __name__ == "__main__":
    sys.exit(main())
