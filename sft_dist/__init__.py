"""sft-dist: exact, elastic, distributed supervised fine-tuning of GPT-family models."""

__version__ = "0.1.0"
