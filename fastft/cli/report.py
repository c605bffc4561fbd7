"""What a run leaves behind: summary.json, loss.png, and the table at the end."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from pathlib import Path
from typing import Any

from .slices import percent


def summarize(config, trainer, speed, handle, model, train_rows, eval_rows) -> dict[str, Any]:
    """The run as plain values for JSON. Seconds and tokens/s are of this process (after --resume: since then)."""
    import torch

    import fastft

    from ..integrations.transformers import peak_memory
    from ..methods.targets import parameter_count
    from .slices import densities, memory, per_layer, share

    history = trainer.state.log_history
    losses = [{"step": h["step"], "loss": h["loss"], "lr": h["learning_rate"]} for h in history if "loss" in h]
    held_out = [{"step": h["step"], "loss": h["eval_loss"]} for h in history if "eval_loss" in h]
    device = trainer.args.device
    trainable, whole = share(handle)
    return {
        "held_out_loss": {"before": held_out[0]["loss"], "after": held_out[-1]["loss"]} if held_out else None,
        "train_loss": {"first": losses[0]["loss"], "last": losses[-1]["loss"]} if losses else None,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "seconds": speed.seconds,
        "tokens_per_second": speed.tokens_per_second,
        "peak_memory_bytes": peak_memory(device),
        "peak_memory_is": "CUDA allocator" if device.type == "cuda" else "resident set of the process",
        "trainable_parameters": trainable,
        "base_parameters": parameter_count(model),
        "trainable_fraction": trainable / whole,
        "adapter_memory_bytes": memory(handle),
        "slices": per_layer(handle),
        "selection": {"choices": handle.method.history, "layers": layers} if (layers := densities(handle)) else None,
        "processes": trainer.args.world_size,
        "rows": {"train": len(train_rows.rows), "held_out": len(eval_rows.rows)},
        "tokens": {"train": train_rows.tokens, "held_out": eval_rows.tokens},
        "data": train_rows.notes,
        "backends": [{"op": op, "backend": name, "calls": n} for (op, name), n in sorted(trainer.backends.items())],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "fastft": fastft.__version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        },
        "title": config.title(),
        "config": config.values(),
        "train_curve": losses,
        "held_out_curve": held_out,
    }


def plot(summary: dict[str, Any], path: Path) -> None:
    """The training curve (thin; its running mean thick where there are enough points) and the held-out losses as points."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [p["step"] for p in summary["train_curve"]], [p["loss"] for p in summary["train_curve"]]
    window = len(losses) // 12
    axes.plot(steps, losses, color="tab:blue", linewidth=1, alpha=0.35 if window > 2 else 1, label="training")
    if window > 2:
        mean = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        axes.plot(steps, mean, color="tab:blue", linewidth=2, label=f"training, mean of {window} values")
    points = summary["held_out_curve"]
    if points:
        axes.plot(
            [p["step"] for p in points], [p["loss"] for p in points], "o", color="tab:orange", label="held out", zorder=3
        )
        for p in points[:: max(1, len(points) - 1)]:
            axes.annotate(
                f"{p['loss']:.3f}",
                (p["step"], p["loss"]),
                textcoords="offset points",
                xytext=(0, -16),
                ha="center",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
                zorder=4,
            )
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(f"{Path(summary['config']['model']).name}, {summary['title']}")
    axes.margins(x=0.05, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_selection(summary: dict[str, Any], path: Path) -> None:
    """What a method that chooses its entries did: how many were replaced at each choice, how many of the first ones still
    train, and how densely each kind of layer trains."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    choices, layers = summary["selection"]["choices"], summary["selection"]["layers"]
    figure = Figure(figsize=(9.6, 4.6), dpi=120, layout="constrained")
    figure.suptitle(f"{Path(summary['config']['model']).name}, {summary['title']}")
    if choices:
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
        steps = [0, *(one["update"] for one in choices)]
        shares = {key: [100 * one[key] / one["entries"] for one in choices] for key in ("changed", "overlap_with_first")}
        top, bottom = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
        top.vlines(steps[1:], 0, shares["changed"], color="tab:blue", linewidth=2)
        top.plot(steps[1:], shares["changed"], "o", color="tab:blue", markersize=4, clip_on=False)
        bottom.step(steps, [100, *shares["overlap_with_first"]], where="post", color="tab:orange", linewidth=2)
        bottom.plot(steps[-1], shares["overlap_with_first"][-1], "o", color="tab:orange", markersize=4, clip_on=False)
        for axes, title in ((top, "Entries replaced at each choice"), (bottom, "Entries that trained first and still do")):
            axes.set_title(title, loc="left", fontsize=10)
            axes.yaxis.set_major_formatter("{x:g} %")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlim(0, max(summary["steps"], steps[-1]))
            axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1e-9))
        top.tick_params(labelbottom=False)
        bottom.set_xlabel("optimizer step")
    axes = figure.add_subplot(grid[:, 1] if choices else 111)
    _plot_densities(axes, layers)
    figure.savefig(path)


def _plot_densities(axes, layers) -> None:
    names = [key.rsplit(".", 1)[-1] for key in layers]
    if len(set(names)) < len(names):
        names = list(layers)
    trains = [100 * statistics.mean(one["density"]) for one in layers.values()]
    changed = [100 * statistics.mean(one["changed"]) for one in layers.values()]
    places = range(len(names))
    if any(b > a for a, b in zip(trains, changed)):
        axes.barh(places, changed, color="tab:blue", alpha=0.3, height=0.6, label="trained before, keeps its value")
    axes.barh(places, trains, color="tab:blue", height=0.6, label="trains now")
    for place, one, width in zip(places, layers.values(), changed):
        axes.annotate(
            percent(one["density"]), (width, place), textcoords="offset points", xytext=(4, 0), va="center", fontsize=9
        )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(changed))
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Share of the weights that trains", loc="left", fontsize=10)
    if len(axes.containers) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8, frameon=False)


def print_summary(summary: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title="run summary", title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # a path is whole also where there is no terminal to say how wide it is
    held_out = summary["held_out_loss"]
    if held_out:
        table.add_row("held-out loss", f"{held_out['before']:.4f} -> {held_out['after']:.4f}")
    if summary["train_loss"]:
        table.add_row("training loss", f"{summary['train_loss']['first']:.4f} -> {summary['train_loss']['last']:.4f}")
    table.add_row("steps", f"{summary['steps']} in {summary['seconds']:.1f} s, {summary['tokens_per_second']:,.0f} tokens/s")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB ({summary['peak_memory_is']})")
    relation = "of" if summary["slices"] else "beside"
    frozen = "parameters" if summary["slices"] else "frozen parameters"
    table.add_row("trainable", f"{summary['trainable_parameters']:,} {relation} {summary['base_parameters']:,} {frozen}")
    ran = "\n".join(f"{b['op']}: {b['backend']} ({b['calls']} calls)" for b in summary["backends"])
    table.add_row("ops ran on", ran or "none recorded")
    table.add_row("adapter", escape(str(out / "adapter")))
    plots = [out / "loss.png", *([out / "selection.png"] if summary["selection"] else [])]
    table.add_row("more", escape(", ".join(map(str, [out / "summary.json", *plots]))))
    Console().print(table)
