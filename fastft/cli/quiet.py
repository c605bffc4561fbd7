"""What other libraries log without anybody having asked for them."""

import logging


def quiet_torchao() -> None:
    """transformers and PEFT import torchao where it is installed, which warns of its extensions for other devices, and of
    its enums. To be called before them."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
