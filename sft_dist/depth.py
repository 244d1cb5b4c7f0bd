"""A deep model's activations from shallow models of the same layers: exact, and as fast for 80 layers as for four."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from transformers import PretrainedConfig

from sft_dist.layers import layers_of
from sft_dist.memory import Alive, Gradient, Traced, trace
from sft_dist.schema import ModelConfig

_SHALLOW = (3, 4)  # layers: the first, the last, and one or two between, which are like all others between
_WORTH_IT = 8  # layers from which on two shallow traces take less time than the deep one


def traced(config: ModelConfig, made: PretrainedConfig, meta: torch.nn.Module, **of_trace: Any) -> Traced:
    """What `trace` gives, for a deep model of equal layers without tracing all of them.

    What is alive grows by the same amount with each layer, so a model of three layers and one of four tell how it goes on.
    Where layers differ, or what the two have in common does not agree, the whole model is traced. `meta`: the model without
    storage.
    """
    layers = made.num_hidden_layers
    if layers >= _WORTH_IT and are_equal(meta, made):
        three, four = (trace(config, shallow(made, count), **of_trace) for count in _SHALLOW)
        if (found := deepened(three, four, layers)) is not None:
            return found
    return trace(config, made, **of_trace)


def are_equal(meta: torch.nn.Module, made: PretrainedConfig) -> bool:
    """Whether all layers are made of the same parts, and nothing in the configuration tells some from others."""
    layers = layers_of(meta, made.num_hidden_layers)
    shapes = {str([(name, one.shape) for name, one in layer.named_parameters()]) for layer in layers}
    return len({str(layer) for layer in layers}) == len(shapes) == 1 and not any(
        len({str(value) for value in values}) > 1 for values in _a_layer_each(made).values()
    )


def _a_layer_each(made: PretrainedConfig) -> dict[str, list[Any]]:
    """What the configuration says of each layer: such as which of them see a window only."""
    count = made.num_hidden_layers
    return {name: value for name, value in vars(made).items() if isinstance(value, list) and len(value) == count}


def shallow(made: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration with its first `layers` layers."""
    less = copy.deepcopy(made)
    less.num_hidden_layers = layers
    for name, values in _a_layer_each(made).items():
        setattr(less, name, values[:layers])
    return less


def deepened(three: Traced, four: Traced, layers: int) -> Traced | None:
    """The trace of `layers` layers, from those of three and four; None where these two do not agree.

    >>> def of(count):  # a layer keeps 10 bytes and has one parameter
    ...     layers = (Gradient(5, Alive(10 * n + 14), Alive(10 * n), n) for n in reversed(range(count)))
    ...     return Traced(Alive(10 * count + 3), (Gradient(9, Alive(10 * count + 3), Alive(10 * count)), *layers))
    >>> deepened(of(3), of(4), 80) == of(80)
    True
    """
    small, large = _by_layer(three), _by_layer(four)
    if small is None or large is None or (small[1], *small[2:]) != (large[2], *large[3:]):
        return None
    (top_of_three, middle, first, last), top, above = small, large[0], large[1]
    if [len(top), len(middle)] != [len(top_of_three), len(above)]:
        return None
    pairs = [*zip(top_of_three, top, strict=True), *zip(middle, above, strict=True)]
    of_a_layer = {(three.forward.bytes - four.forward.bytes, three.forward.logits - four.forward.logits)}
    for one, other in pairs:
        of_a_layer |= {
            (before.bytes - after.bytes, before.logits - after.logits)
            for before, after in ((one.peak, other.peak), (one.after, other.after))
        }
    if len(of_a_layer) > 1 or any(one.numel != other.numel for one, other in pairs):
        return None
    more = layers - _SHALLOW[1]
    made = [_grown(*pair, more) for pair in zip(top_of_three, top, strict=True)]
    for number in range(layers - 2, 0, -1):  # the one next above the first is `middle`, the next one `above`
        made += [_grown(*pair, number - 2) for pair in zip(middle, above, strict=True)]
    host = four.host + (four.host - three.host) * more
    return Traced(_further(three.forward, four.forward, more), (*made, *first, *last), host)


def _by_layer(one: Traced) -> list[list[Gradient]] | None:
    """Gradients in the order they come: the uppermost layer's with what is above it, each layer's below, and the rest.

    None where they do not come layer by layer.
    """
    numbers = [gradient.layer for gradient in one.gradients]
    inner = [number for number in numbers if number >= 0]
    count = max(inner, default=-1) + 1
    if not inner or inner != sorted(inner, reverse=True) or set(inner) != set(range(count)):
        return None
    begins = [numbers.index(number) for number in reversed(range(count))]
    end = len(numbers) - numbers[::-1].index(0)
    cuts = [0, *begins[1:], end, len(numbers)]
    if -1 in numbers[begins[0] : end]:
        return None
    return [list(one.gradients[begin:stop]) for begin, stop in itertools.pairwise(cuts)]


def _further(before: Alive, after: Alive, more: int) -> Alive:
    return Alive(*(last + (last - first) * more for first, last in zip(before, after, strict=True)))


def _grown(of_three: Gradient, of_four: Gradient, more: int) -> Gradient:
    return of_four._replace(
        peak=_further(of_three.peak, of_four.peak, more),
        after=_further(of_three.after, of_four.after, more),
        layer=of_four.layer + more if of_four.layer >= 0 else -1,
    )
