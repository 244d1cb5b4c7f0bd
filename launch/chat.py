"""A conversation with a model."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from launch.models import device, is_run, opened
from sft_dist.data.tokenise import Tokenizer
from sft_dist.errors import ConfigError


def answer_prompt(model: str, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer to one prompt, through its own chat template."""
    loaded, folder, _ = opened(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{model}: its tokenizer has no chat template; export it from a run, or add one")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device())
    length = asked["input_ids"].shape[1]
    context = getattr(loaded.config, "max_position_embeddings", None) or length + max_new_tokens
    if length >= context:
        raise ConfigError(f"--prompt: {length} tokens do not leave room in a context of {context}; shorten it")
    ends = Tokenizer.load(folder).end_ids if is_run(model) else loaded.generation_config.eos_token_id
    with torch.no_grad():
        made = loaded.to(device()).generate(
            **asked,
            max_new_tokens=min(max_new_tokens, context - length),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
        )
    return tokenizer.decode(made[0, length:], skip_special_tokens=True).strip()
