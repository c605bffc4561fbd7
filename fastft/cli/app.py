"""The commands of `fastft` as a typer application. The options of `train` and `serve` are the fields of
their configurations."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from typing import Annotated, Any

import typer

from .config import TrainConfig, make_config
from .errors import UserError
from .serve_config import ServeConfig, make_serve_config

app = typer.Typer(
    help="Fine-tune language models with fast kernels, and serve many adapters on one base model.",
    epilog="fastft --version prints the version; fastft COMMAND --help the options of one.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(help="Versions, what this machine can run, and the table op x backend.")
def info() -> None:
    from ..info import main

    raise typer.Exit(main() or 0)


def train(config: str | None, resume: bool, overwrite: bool, dry_run: bool, **options: Any) -> None:
    from .folder import resume_options
    from .launch import rank_0_speaks
    from .train import run

    with _friendly(), rank_0_speaks():
        if resume:
            config, options = resume_options(config, options)
        run(make_config(options, config), resume=resume, overwrite=overwrite, dry_run=dry_run)


def _signature(config: type, switches: dict[str, tuple[Any, Any, Any]]) -> inspect.Signature:
    """A command's options: its switches (type, default, option by name), then the fields of its configuration, None where
    the user gave nothing."""

    def parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])

    parameters = [parameter(name, *switch) for name, switch in switches.items()]
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = kinds[field.name]
        required = field.default is dataclasses.MISSING
        default = "" if required or field.default is None else f" [default: {field.default}]"
        option = typer.Option(help=field.metadata["help"] + (" [required]" if required else default), show_default=False)
        parameters.append(parameter(field.name, kind if type(None) in typing.get_args(kind) else kind | None, None, option))
    return inspect.Signature(parameters)


def _add_command(function: Any, signature: inspect.Signature, help: str, short: str) -> None:
    """short: its line in `fastft --help`, which cuts longer ones at 80 columns."""
    function.__signature__ = signature
    function.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    app.command(function.__name__, help=help, short_help=short)(function)


_add_command(
    train,
    _signature(
        TrainConfig,
        {
            "config": (str | None, None, typer.Option(help="YAML file of the options below; options given here win.")),
            "resume": (bool, False, typer.Option("--resume", help="Continue from OUT's last checkpoint.")),
            "overwrite": (bool, False, typer.Option("--overwrite", help="Replace an earlier run in OUT.")),
            "dry_run": (
                bool,
                False,
                typer.Option(
                    "--dry-run", help="Print trainable parameters, memory estimate and matched modules; train nothing."
                ),
            ),
        },
    ),
    "Fine-tune a causal language model on JSON lines, with low-rank adapters (--method lora) or by training a few of "
    "its channels and heads (--method s2ft) or single entries of its weights (--method spiel, lift) in place; the adapter "
    "goes to OUT/adapter.",
    "Fine-tune a causal language model on JSON lines.",
)


def serve(**options: Any) -> None:
    from .serve import run

    with _friendly():
        run(make_serve_config(options))


_add_command(
    serve,
    _signature(ServeConfig, {}),
    "Serve a base model and its adapters, all in one batch, through OpenAI's HTTP interface.",
    "Serve a base model and its adapters, through OpenAI's interface.",
)


@app.command(help="Fold an adapter into its model: a plain transformers checkpoint.")
def merge(
    model: Annotated[str, typer.Option(help="Folder of the base checkpoint, or a Hub id.")],
    adapter: Annotated[str, typer.Option(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    out: Annotated[str, typer.Option(help="New folder for the checkpoint.")],
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in OUT.")] = False,
) -> None:
    from .merge import run

    with _friendly():
        run(model, adapter, out, dtype, overwrite)


@app.command(
    help="Interleaved benchmarks against the floor and peers (fastft bench FAMILY ...).",
    short_help="Measure what adapters cost here, beside other implementations.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(context: typer.Context) -> None:
    from .main import _bench

    sys.exit(_bench(context.args))


@app.command(
    help="Search the Triton kernels' launch configurations on this GPU and write them (fastft tune [FAMILY ...]).",
    short_help="Search the Triton kernels' launch configurations on this GPU.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def tune(context: typer.Context) -> None:
    from ..tune import main

    sys.exit(main(context.args))


class _friendly:
    """Print a UserError's message without a traceback and exit with 2, as for wrong options; Ctrl-C exits with 130."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, (UserError, OSError)):
            known = isinstance(error, OSError) and error.filename is not None and error.strerror
            typer.echo(f"fastft: {error.filename}: {error.strerror}" if known else f"fastft: {error}", err=True)
            raise typer.Exit(2) from None
        if isinstance(error, KeyboardInterrupt):
            typer.echo(f"fastft: {str(error) or 'stopped'}", err=True)  # a training run says how to go on
            raise typer.Exit(130) from None
