"""Adapters: small matrices that are trained beside a frozen model's linear layers, by peft, and what becomes of them.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds to a matrix the product of two of a low rank; QLoRA (Dettmers et al. 2023,
arXiv:2305.14314) keeps the frozen matrix itself in 4 bits a weight, by bitsandbytes. The model stays the one that transformers
built: the head, the kernels of attention and evaluation go on as ever.
"""

from __future__ import annotations

import copy
import difflib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft_dist.errors import ModelError
from sft_dist.files import digest_of, digest_of_block
from sft_dist.schema import LoraConfig

warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks for it by its old name
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns of a kernel on the hub
FILE = "adapter_model.safetensors"  # of a folder of adapters
NAME = "default"  # of the adapter, among those that peft could hold


def add(model: PreTrainedModel, wanted: LoraConfig, seed: int) -> None:
    """Freeze the model, and set trained matrices beside its linear layers: random as a function of `seed`, adding nothing yet.

    Raises ModelError for a name in `target_modules` that is none of the model's linear layers.

    >>> add(model, LoraConfig(rank=8, target_modules=["q_proj", "v_proj"]), seed=0)  # doctest: +SKIP
    """
    import peft

    names = _targets(model, wanted.target_modules)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=wanted.rank,
        lora_alpha=int(wanted.alpha) if wanted.alpha.is_integer() else wanted.alpha,  # other programs want whole ones
        lora_dropout=wanted.dropout,
        target_modules=_short(model, names),
        fan_in_fan_out=all(_is_turned(model.get_submodule(name)) for name in names),
    )
    torch.manual_seed(seed)
    try:
        peft.inject_adapter_in_model(config, model, NAME)
    except ValueError as error:
        raise ModelError(
            f"model.lora: peft cannot adapt {type(model).__name__}: {str(error).splitlines()[0]}. Name other target_modules"
        ) from None


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """Name and module of the linear layers, without the head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            yield name, module


def frozen_matrices(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Of the linear layers beside which something is trained, or could be: what `quantise` puts into nf4."""
    weights = (cast(torch.Tensor, module.weight) for _, module in linear_layers(model))
    return (weight for weight in weights if not weight.requires_grad)


def _targets(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Full names of the layers to be adapted."""
    names = [name for name, _ in linear_layers(model)]
    if isinstance(wanted, str):
        return names
    found = {one: [name for name in names if name == one or name.endswith(f".{one}")] for one in wanted}
    for one in (one for one in wanted if not found[one]):
        known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        near = difflib.get_close_matches(one, known, n=1)
        head = model.get_output_embeddings()
        is_head = any(module is head for name, module in model.named_modules() if f".{name}".endswith(f".{one}"))
        hint = "the head is not adapted, leave it out. " if is_head else f"did you mean {near[0]}? " if near else ""
        raise ModelError(
            f"model.lora.target_modules: {one!r} is no linear layer of {type(model).__name__}; {hint}There are "
            f"{', '.join(known)}; all-linear takes them all"
        )
    chosen = set().union(*found.values())
    return [name for name in names if name in chosen]


def _short(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The last parts of these names alone, where they mean the same layers."""
    ends = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if meant == set(names) else names


def _is_turned(module: torch.nn.Module) -> bool:
    """Whether its matrix is stored as [in, out], as GPT-2's are, or was before it was quantised."""
    return isinstance(module, Conv1D) or getattr(module, "was_turned", False)


def quantise(model: PreTrainedModel) -> None:
    """Put the linear layers into nf4, in place: 4 bits a weight, and a scale in fp32 for 64 of them.

    What comes out is a function of the weights alone, never of rank, precision or machine: so it is done on the CPU (a GPU rounds
    some otherwise), and scales are not quantised in their turn, since bitsandbytes takes their mean in an order that the number
    of threads decides.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(linear_layers(model)):
        weight, bias = cast(torch.Tensor, module.weight).detach(), module.bias
        weight = weight.T if _is_turned(module) else weight
        (nf, nx), how = weight.shape, {"quant_type": "nf4", "compress_statistics": False}
        made = Linear4bit(nx, nf, bias=bias is not None, device="meta", **how)
        values = weight.float().contiguous()  # from fp32 they come back in fp32, in the backward pass as in the forward
        made.weight = Params4bit(values, requires_grad=False, module=made, **how).to("cpu")
        made.bias, made.was_turned = bias, _is_turned(module)
        made.support_avx512bf16_for_cpu = False  # in evaluation it packs weights in a way that training cannot read
        model.set_submodule(name, made)
    model.is_loaded_in_4bit = True  # as peft knows it


def scales_to(model: torch.nn.Module, device: torch.device) -> None:
    """Put the scales of what is in nf4 there: ZeRO 3 moves the weights that it shares out, and knows of no scales."""
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            state.to(device)


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Add what was learned to the matrices beside it, in place and in fp32: a plain model, which computes what training computed.

    Matrices in nf4 become what their 4 bits stand for, which is what the adapters were trained beside.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in [pair for pair in model.named_modules() if hasattr(pair[1], "was_turned")]:
        model.set_submodule(name, _unpacked(module))
    for name, module in [pair for pair in model.named_modules() if isinstance(pair[1], LoraLayer)]:
        plain, more = module.get_base_layer(), module.get_delta_weight(NAME)
        plain.weight += more if _is_turned(plain) == module.fan_in_fan_out else more.T
        model.set_submodule(name, plain)
    del model.peft_config
    model.is_loaded_in_4bit = False


def _unpacked(module: Any) -> torch.nn.Module:
    """The plain layer of one in nf4."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight, module.weight.quant_state).float()
    nf, nx = weight.shape
    made: Any = Conv1D(nf, nx) if module.was_turned else torch.nn.Linear(nx, nf, bias=False, device="meta")
    made.weight = torch.nn.Parameter(weight.T.contiguous() if module.was_turned else weight)
    made.bias = module.bias
    return made


def save(model: PreTrainedModel, folder: Path, base: str) -> None:
    """What was learned as a folder that peft and vLLM read: `adapter_config.json` and `adapter_model.safetensors`.

    `base`: the folder or id of the model that it is to be loaded beside.
    """
    config = copy.copy(model.peft_config[NAME])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    learned = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file({saved_name(name): p for name, p in learned.items()}, folder / FILE, metadata={"format": "pt"})


def saved_name(name: str) -> str:
    """What a parameter of an adapter is called in a folder of adapters.

    >>> saved_name("model.layers.0.mlp.up_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"


def loaded(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The `base` with the adapters of a folder beside it, as peft loads them."""
    import peft

    return peft.PeftModel.from_pretrained(base, folder).eval().get_base_model()


def num_elements(parameter: Any) -> int:
    """Weights of a parameter, however they are kept: in nf4 two share a byte, and under ZeRO 3 ranks share them."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def base_digest(model: torch.nn.Module) -> str:
    """32 hexadecimal digits that stand for the frozen weights, in whatever files they were; before ZeRO shards them."""
    frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    return digest_of(
        {
            name.replace(".base_layer.", "."): [_digest(each) for each in _stored(parameter)]
            for name, parameter in frozen
        }
    )


def _stored(parameter: Any) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    return [parameter, *(state.as_dict(packed=True).values() if state is not None else ())]


def _digest(values: torch.Tensor) -> str:
    return digest_of_block(values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
