"""The `fastft` command. Importable with the core install: what a command needs beyond it is imported when it runs."""

from __future__ import annotations

import importlib.util
import sys

TRAIN = ("typer", "rich", "transformers", "accelerate", "yaml", "matplotlib")
# The extra and the packages of it that a command imports; those of `train` for any other.
NEEDS = {
    "merge": ("train", ("typer", "transformers")),
    "serve": ("serve", ("typer", "rich", "transformers", "fastapi", "uvicorn", "prometheus_client")),
}


def main() -> None:
    """Entry point. Ctrl-C ends every command without a traceback, also while it still imports."""
    if hasattr(sys.stdout, "reconfigure"):  # into a file or a pipe, lines would come when the run is over, if at all
        sys.stdout.reconfigure(line_buffering=True)
    try:
        _run()
    except KeyboardInterrupt:
        print("fastft: stopped", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    """Without its extra a command other than `fastft info`, `bench` and `tune` says what to install."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:  # here, as the core install has no typer
        from .. import __version__

        print(f"fastft {__version__}")
        return
    if arguments[:1] == ["info"] and len(arguments) == 1:
        from ..info import main as info

        sys.exit(info())
    if arguments[:1] == ["bench"]:  # its options are its own: nothing here parses them
        sys.exit(_bench(arguments[1:]))
    if arguments[:1] == ["tune"]:  # the same
        from ..tune import main as tune

        sys.exit(tune(arguments[1:]))
    extra, names = NEEDS.get(arguments[0] if arguments else "", ("train", TRAIN))
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"fastft: {', '.join(missing)} not installed; run: pip install 'fastft[{extra}]'\n(fastft info works without)"
        )
    from .app import app

    app()


def _bench(arguments: list[str]):
    try:
        from ..bench.run import main as bench
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("fastft"):
            raise
        return f"fastft: {error.name} not installed; run: pip install 'fastft[bench]'"
    return bench(arguments)


if __name__ == "__main__":
    main()
