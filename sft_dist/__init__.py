"""sft-dist: exact, elastic, distributed supervised fine-tuning of GPT-family models."""

import logging

__version__ = "0.1.0"

# transformers imports torchao wherever it is installed, and that warns of kernels for other purposes, and of torch
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
