"""What other libraries log without anybody having asked for them."""

import logging


def quiet_imports() -> None:
    """transformers and PEFT import torchao and bitsandbytes where they are installed. The first warns of its extensions for
    other devices, and of its enums, the second of a kernel that it would fetch for this CPU. To be called before them."""
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
