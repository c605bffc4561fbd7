"""Load models and tokenizers for the commands, with messages a user can act on."""

from __future__ import annotations

import functools
import importlib.util
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import current
from ..checkpoint.files import CONFIG
from ..listing import listed
from .errors import UserError
from .quiet import quiet_imports

quiet_imports()


def check_model(model: str) -> str:
    """`model` as transformers takes it. Hub ids (owner/name) are left to transformers, and said to be.

    Raises:
        UserError: a local folder that is missing or no checkpoint.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model {model}: no config.json in this folder, so it is no transformers checkpoint")
        return str(path)
    if path.exists():
        raise UserError(f"model {model} is a file; give the checkpoint's folder")
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise UserError(f"model {model}: no such folder")
    _say_hub(model)
    return model


@functools.cache  # a command loads a tokenizer, a configuration and a model
def _say_hub(model: str) -> None:
    """A mistyped folder is seen at once, not only when transformers has given up on the network a minute later."""
    print(f"fastft: no folder {model} here; asking the Hugging Face Hub for it ...", file=sys.stderr, flush=True)


def load(auto_class: str, model: str, **options: Any) -> Any:
    """`transformers.<auto_class>.from_pretrained(model, **options)`.

    Raises:
        UserError: the checkpoint is missing or unreadable, or its weights are not those of the architecture.
    """
    import transformers
    from safetensors import SafetensorError

    path = check_model(model)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of reading local files; downloads keep theirs
    from_pretrained: Callable = getattr(transformers, auto_class).from_pretrained
    weights = auto_class.startswith("AutoModel")
    if weights:  # sizes are looked at below, too: transformers' error is that its report names them, which is silenced
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    known = (OSError, ValueError, KeyError, ImportError, RuntimeError)
    if auto_class == "AutoTokenizer":  # the tokenizers library has no kinds of errors
        known = Exception
    try:
        loaded = from_pretrained(path, **options)
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"model {model}: its weights are damaged or cut short: {error}") from error
    except known as error:
        raise UserError(f"model {model}: {auto_class} cannot load it: {str(error).strip() or repr(error)}") from error
    if not weights:
        return loaded
    loaded, found = loaded
    _check_weights(model, type(loaded).__name__, found)
    return loaded


def _check_weights(model: str, architecture: str, found: dict[str, Any]) -> None:
    """transformers gives random values to what a checkpoint lacks, with a warning at most.

    Raises:
        UserError: weights are missing, or have another size.
    """
    for key, stored, wanted in sorted(found["mismatched_keys"]):
        raise UserError(
            f"model {model}: {key} is {list(stored)} in its file and {list(wanted)} in {architecture} by its config.json"
        )
    others = listed(sorted(found["unexpected_keys"]))
    if found["missing_keys"]:
        hint = f" (it has others: {others})" if others else ""
        raise UserError(
            f"model {model}: its files lack weights that {architecture} has by its config.json: "
            f"{listed(sorted(found['missing_keys']))}{hint}"
        )
    if others:
        print(f"note: weights of {model} that {architecture} does not have are left out: {others}")


def check_bitsandbytes(bits: int | None) -> None:
    """Raises UserError if weights of that many bits are asked for and there is no library for them."""
    if bits and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f'--load-in-{bits}bit needs bitsandbytes: pip install "fastft[qlora]"')


def load_base(model: str, device: Any, dtype: Any, bits: int | None = None) -> Any:
    """The causal language model on `device`. bits: 4 quantises its linear layers to NF4 with double quantisation, which
    computes in `dtype`, 8 to int8; the output head and embeddings stay, as in transformers.

    Raises:
        UserError: the checkpoint is missing or unreadable, or bitsandbytes is missing.
    """
    check_bitsandbytes(bits)
    options: dict[str, Any] = {"dtype": dtype}
    if not bits and getattr(load("AutoConfig", model), "quantization_config", None) is None:
        return load("AutoModelForCausalLM", model, **options).to(device)
    if bits:
        options["quantization_config"] = _quantization(bits, dtype)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of each cast of int8's activations
    base = load("AutoModelForCausalLM", model, device_map={"": str(device)}, **options)
    for module in base.modules():
        # On CPUs that have AVX512-BF16 a layer without an adapter would rearrange its weight in the first evaluation, and
        # then has no backward any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def check_adapter(folder: str) -> None:
    """Raises UserError if there is no adapter in this folder."""
    if not current(Path(folder).expanduser(), CONFIG).is_file():
        inside = Path(folder, "adapter")  # of a run's folder
        found = current(inside.expanduser(), CONFIG).is_file()
        raise UserError(f"adapter {folder}: no {CONFIG} there" + (f"; did you mean {inside}?" if found else ""))


def load_adapter(base: Any, folder: str) -> Any:
    """The handle of the adapter in this folder on `base`. Raises UserError where they don't fit, or it is damaged."""
    import fastft

    try:
        return fastft.load(base, Path(folder).expanduser())
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"adapter {folder}: {error}") from error


def _quantization(bits: int, dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
