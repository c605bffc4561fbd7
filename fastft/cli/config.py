"""One typed configuration of a training run: its fields are the options of `fastft train` and the keys of its YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import UserError

# Peak learning rates where none is given; of spiel and lift from the ranges that their papers searched.
LEARNING_RATES = {"lora": 2e-4, "s2ft": 2e-4, "spiel": 1e-4, "spiel by momentum": 1e-3, "lift": 1e-4}


def _option(help: str, default: Any = dataclasses.MISSING, of: str | None = None) -> Any:
    """of: the only methods that have this option, with commas."""
    return dataclasses.field(default=default, metadata={"help": f"{of}: {help}" if of else help, "of": of})


@dataclass
class TrainConfig:
    """Everything that decides a run's numbers. `fastft train` writes it to OUT/config.yaml, which repeats the run."""

    model: str = _option("Folder of a transformers checkpoint, or a Hub id.")
    data: str = _option('JSON lines: {"text"}, {"prompt", "completion"} or {"messages"}.')
    out: str = _option("Folder for the adapter, checkpoints, summary and plot.")
    method: Literal["lora", "s2ft", "spiel", "lift"] = _option(
        "lora: low-rank adapters; s2ft: a few channels and heads of the model itself (structured sparse fine-tuning); "
        "spiel: single entries of the weights, which move to where gradients are large; lift: the entries that matter most "
        "to each weight's low-rank part.",
        "lora",
    )
    adapter: str | None = _option(
        "Adapter to train on from: a folder that fastft (or PEFT) saved, of the same --method. It brings its own options.",
        None,
    )
    eval_data: str | None = _option("Held-out JSON lines; else --eval-fraction of the data.", None)
    eval_fraction: float = _option("Fraction of the data held out (0: none).", 0.05)
    max_length: int = _option("Tokens an example may have; what is longer is cut.", 512)
    packing: bool = _option("Fill rows of max-length with several examples, which then see each other.", False)
    dtype: Literal["auto", "float32", "bfloat16"] = _option(
        "Of the base model. auto: bfloat16 on a GPU that has it.", "auto"
    )
    device: Literal["auto", "cpu", "cuda"] = _option("Where to train.", "auto")
    load_in_4bit: bool = _option(
        "QLoRA: quantise the base to NF4 when it is loaded (bitsandbytes).", False, of="lora, spiel"
    )
    load_in_8bit: bool = _option("Quantise the base to int8 when it is loaded (bitsandbytes).", False, of="lora, spiel")
    r: int = _option("Rank.", 8, of="lora")
    alpha: float = _option("The update's scale is alpha / r.", 16.0, of="lora")
    dropout: float = _option("Dropout before A.", 0.0, of="lora")
    rslora: bool = _option("Scale by alpha / sqrt(r).", False, of="lora")
    use_dora: bool = _option("DoRA: train the magnitude of each output apart from its direction.", False, of="lora")
    lora_bias: bool = _option("Train a bias on B.", False, of="lora")
    down_ratio: float = _option("Fraction of feed-forward channels whose columns of down train.", 0.03, of="s2ft")
    o_ratio: float = _option("Fraction of attention heads whose columns of o train.", 0.0, of="s2ft")
    up_ratio: float = _option("Fraction of feed-forward channels whose rows of up train.", 0.0, of="s2ft")
    v_ratio: float = _option("Fraction of attention heads (groups of them) whose rows of v train.", 0.0, of="s2ft")
    gate_ratio: float = _option("Fraction of feed-forward channels whose rows of gate train.", 0.0, of="s2ft")
    select: Literal["random", "weight", "activation", "product", "gradient"] = _option(
        "Which channels and heads: random ones, or by the size of their weights, activations, both or gradients.",
        "random",
        of="s2ft",
    )
    largest: bool = _option("Take those with the largest scores, not the smallest.", False, of="s2ft")
    multiple: int = _option("Each layer's count is a multiple of this.", 1, of="s2ft")
    calibration_rows: int = _option(
        "First rows of the training data, on which activations and gradients are measured.", 64, of="s2ft"
    )
    density: float | None = _option(
        "Fraction of entries that train: of the model's parameters with spiel (else 0.01), of each weight with lift.",
        None,
        of="spiel, lift",
    )
    selection: Literal["accumulated", "momentum"] = _option(
        "What grows: entries with the largest gradients summed over a few steps, or (SM3 instead of AdamW) the largest "
        "row and column accumulators.",
        "accumulated",
        of="spiel",
    )
    reselection_steps: int = _option("Optimizer steps between two choices.", 20, of="spiel")
    selection_accumulation_steps: int = _option("Steps of them after which the choice is made.", 5, of="spiel")
    initial_reselection_rate: float = _option(
        "Fraction of the entries that a choice replaces; falls to 0 over the run.", 0.2, of="spiel"
    )
    policy: Literal["linear", "cosine"] = _option("How it falls; linear replaces all at first.", "linear", of="spiel")
    rank_budget: int | None = _option(
        "Each weight trains as many entries as a LoRA of this rank (else 128, unless --density).", None, of="lift"
    )
    filter_rank: int = _option("Rank of the approximation whose largest entries train.", 128, of="lift")
    update_interval: int = _option("Optimizer steps between two choices.", 200, of="lift")
    target_modules: str = _option(
        "all-linear (s2ft: all that its ratios name), names with commas (q_proj,v_proj), or a regular expression.",
        "all-linear",
    )
    epochs: float = _option("Passes over the data.", 1.0)
    max_steps: int | None = _option("Optimizer steps; overrides epochs.", None)
    batch_size: int = _option("Examples (rows with packing) a forward.", 8)
    gradient_accumulation: int = _option("Forwards an optimizer step.", 1)
    gradient_checkpointing: bool = _option("Recompute activations in backward: less memory, more time.", False)
    lr: float | None = _option(
        f"Peak learning rate; else {', '.join(f'{rate:g} ({name})' for name, rate in LEARNING_RATES.items())}.", None
    )
    schedule: Literal["cosine", "linear", "constant"] = _option("Learning rate after warm-up.", "cosine")
    warmup: float = _option("Warm-up steps; below 1: their fraction of all steps (less than one step: none).", 0.03)
    weight_decay: float = _option(
        "Decoupled decay; of methods that train the weights in place, towards the pretrained ones.", 0.0
    )
    max_grad_norm: float = _option("Gradients are clipped to this norm (0: not).", 1.0)
    seed: int = _option("Of the split, the order, the adapter's start, random choices (s2ft, spiel) and dropout.", 0)
    log_steps: int | None = _option("Steps between loss values; else about 200 values a run.", None)
    eval_steps: int | None = _option("Steps between held-out losses; else only before and after.", None)
    save_steps: int | None = _option("Steps between checkpoints; else one an epoch.", None)
    keep_checkpoints: int = _option("Checkpoints kept.", 2)

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value = _coerce(name, getattr(self, name), kind)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, not {value}")
            setattr(self, name, value)
        self._refuse_other_methods()
        if self.adapter is not None:
            self._refuse_the_adapters()
        if self.lr is None:
            selection = self.selection if self.adapter is None else _selection_of(self.adapter)
            by_momentum = self.method == "spiel" and selection == "momentum"
            self.lr = LEARNING_RATES["spiel by momentum" if by_momentum else self.method]
        if self.target_modules == "":
            raise UserError("target_modules is empty")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be in [0, 1), not {self.eval_fraction}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), not {self.dropout}")
        for name, ratio in self.ratios().items():
            if not 0 <= ratio <= 1:
                raise UserError(f"{name} must be in [0, 1], not {ratio}")
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit and load_in_8bit exclude each other; give one of them")
        if self.bits() and self.use_dora:
            raise UserError("use_dora needs the norms of the weights' rows, which a quantised base does not have at hand")
        if self.method == "s2ft" and not any(self.ratios().values()):
            raise UserError(f"method s2ft trains nothing: all of {', '.join(self.ratios())} are 0")
        self._check_entries()
        for name in (
            "r",
            "multiple",
            "calibration_rows",
            "reselection_steps",
            "selection_accumulation_steps",
            "rank_budget",
            "filter_rank",
            "update_interval",
            "batch_size",
            "gradient_accumulation",
            "keep_checkpoints",
            "epochs",
            "max_steps",
            "log_steps",
            "eval_steps",
            "save_steps",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} must be positive, not {value}")
        if not 0 <= self.seed < 2**32:  # what NumPy's generator takes, which Trainer seeds too
            raise UserError(f"seed must be in [0, 2**32), not {self.seed}")
        if self.max_length < 2:
            raise UserError(f"max_length must be at least 2, not {self.max_length}: the first token has no loss")
        for name in ("lr", "warmup", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.warmup >= 1 and not self.warmup.is_integer():
            raise UserError(f"warmup must be a whole number of steps or less than 1, a fraction of them; not {self.warmup}")
        self._refuse_without_effect()

    def _check_entries(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"density must be in (0, 1], not {self.density}")
        if self.density is not None and self.rank_budget is not None:
            raise UserError("density and rank_budget both say how many entries train; give one of them")
        if not 0 <= self.initial_reselection_rate <= 1:
            raise UserError(f"initial_reselection_rate must be in [0, 1], not {self.initial_reselection_rate}")
        if self.selection_accumulation_steps > self.reselection_steps:
            raise UserError(
                f"selection_accumulation_steps={self.selection_accumulation_steps} is more than "
                f"reselection_steps={self.reselection_steps}"
            )

    def _refuse_other_methods(self) -> None:
        """What this run's method does not have must not be passed over. An option at its default counts as not given."""
        for field in dataclasses.fields(self):
            value, methods = getattr(self, field.name), (field.metadata["of"] or self.method).split(", ")
            if self.method not in methods and value != field.default:
                of = f"method{'s' if len(methods) > 1 else ''} {' and '.join(methods)}"
                raise UserError(f"{field.name}={value!r} is an option of {of}; this run's method is {self.method}")

    def _refuse_without_effect(self) -> None:
        """Nor what another option leaves nothing to do."""
        measured = self.select in ("activation", "product", "gradient")
        for name, used, why in (
            ("largest", self.select != "random", "select=random has no scores"),
            ("calibration_rows", measured, f"select={self.select} measures nothing on the data"),
            ("eval_steps", self.eval_fraction or self.eval_data is not None, "eval_fraction=0 holds nothing out"),
            ("eval_fraction", self.eval_data is None or not self.eval_fraction, f"eval_data {self.eval_data} is held out"),
        ):
            value = getattr(self, name)
            if not used and value != getattr(type(self), name):
                raise UserError(f"{name}={value!r} has no effect: {why}; leave one of them out")

    def _refuse_the_adapters(self) -> None:
        """What an adapter to train on from has in its file."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if _is_an_adapters(field) and value != field.default:
                raise UserError(f"{field.name}={value!r}: adapter {self.adapter} has its own; leave it out")

    def ratios(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("_ratio")}

    def bits(self) -> int | None:
        """Of the base's quantised weights; None: it is not quantised."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def title(self) -> str:
        """The method and what matters most about it, for titles."""
        if self.adapter is not None:
            return f"{self.method}, on from {self.adapter}"
        if self.method == "s2ft":
            return " ".join(["s2ft", *(f"{name}={ratio:g}" for name, ratio in self.ratios().items() if ratio)])
        base = f", {self.bits()}-bit base" if self.bits() else ""
        if self.method == "spiel":
            return f"spiel {', '.join(f'{k}={v:g}' for k, v in self.entries().items())}, {self.selection}{base}"
        if self.method == "lift":
            return f"lift {', '.join(f'{k}={v:g}' for k, v in self.entries().items())}, filter_rank={self.filter_rank}"
        return f"{self.method} r={self.r}{base}"

    def entries(self) -> dict[str, float]:
        """How many entries train, as spiel or lift takes it."""
        if self.rank_budget is None and (self.density is not None or self.method == "spiel"):
            return {"density": 0.01 if self.density is None else self.density}
        return {"rank_budget": self.rank_budget or 128}

    def targets(self) -> str | list[str] | None:
        """`target_modules` as the method takes it: names become a list; else "all-linear" or a regular expression. None for
        S²FT's default."""
        if self.method == "s2ft" and self.target_modules == "all-linear":
            return None
        if self.target_modules != "all-linear" and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", self.target_modules):
            return [name.strip() for name in self.target_modules.split(",")]
        return self.target_modules

    def yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.values(), sort_keys=False)

    def values(self) -> dict[str, Any]:
        """Of all options but those that an adapter to train on from has in its file: the defaults are not what it has."""
        fields = [field for field in dataclasses.fields(self) if self.adapter is None or not _is_an_adapters(field)]
        return {field.name: getattr(self, field.name) for field in fields}


def _is_an_adapters(field: dataclasses.Field) -> bool:
    of_the_base = field.name.startswith("load_in_")
    return field.name == "target_modules" or (field.metadata["of"] is not None and not of_the_base)


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`; YAML reads 1e-4 as text and 1 as int, so numbers are converted where nothing is lost."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value in choices:
            return value
        raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}{_near(str(value), choices)}")
    if type(None) in choices:
        if value is None:
            return None
        kind = next(c for c in choices if c is not type(None))
    if name == "target_modules" and isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = float("nan")
        if kind is float and number == number:
            return number
        if kind is int and number.is_integer():
            return int(number)
    raise UserError(f"{name} must be {kind.__name__}, not {value!r}")


def _selection_of(adapter: str) -> str | None:
    """How SpIEL chose the entries of an adapter. What is not there, or damaged, is refused where it is read."""
    from ..checkpoint.atomic import current
    from ..checkpoint.files import CONFIG

    try:
        return json.loads(current(Path(adapter).expanduser(), CONFIG).read_bytes()).get("selection")
    except (OSError, ValueError, AttributeError):
        return None


def _near(word: str, words: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def make_config(options: dict[str, Any], file: str | None = None) -> TrainConfig:
    """The configuration of a YAML file (if any) with `options` (None: not given) on top.

    Raises:
        UserError: a missing or malformed file, an unknown key (near matches are named), a wrong value, a missing key.
    """
    values: dict[str, Any] = {}
    if file is not None:
        import yaml

        try:
            with open(os.path.expanduser(file), encoding="utf-8") as stream:
                values = yaml.safe_load(stream) or {}
        except OSError as error:
            raise UserError(f"config {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"config {file} is not UTF-8: {error.reason} at byte {error.start}; give a YAML file") from None
        except RecursionError:
            raise UserError(f"config {file} is nested too deeply; give a mapping of options") from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits, a day that is none
            raise UserError(f"config {file} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"config {file} must be a mapping of options, not {type(values).__name__}")
        known = [f.name for f in dataclasses.fields(TrainConfig)]
        for key in values:
            if key not in known:
                raise UserError(f"config {file}: unknown option {key!r}{_near(str(key), known)}")
    values.update({key: value for key, value in options.items() if value is not None})
    missing = [name for name in ("model", "data", "out") if values.get(name) is None]
    if missing:
        raise UserError(f"missing {', '.join('--' + name for name in missing)} (or the same key in --config FILE)")
    try:
        return TrainConfig(**values)
    except UserError as error:
        if file is None:
            raise
        raise UserError(f"{error} (in config {file}, or an option beside it)") from None
