"""What GPUs there are: their memory, and the most that they compute, as their makers say."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from sft_dist.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in bytes that a program sees; dense FLOP/s in 16 bit and in fp32 (None: not known).

    Bytes a second: of its memory, and one way to the others of its node and from a node of eight to another, by all cards of that.
    """

    name: str
    memory_bytes: float
    flops_16_bit: float | None = None
    flops_fp32: float | None = None
    memory_rate: float | None = None
    within_node: float | None = None
    between_nodes: float | None = None

    @property
    def usable_bytes(self) -> float:
        """Without what CUDA, NCCL and cuBLAS take (2 GiB), and 5 % for an allocator that does not fill every gap.

        >>> round(gpu("h100-80gb").usable_bytes / GIB, 1)
        73.1
        """
        return 0.95 * self.memory_bytes - 2 * GIB

    def flops(self, precision: str) -> float | None:
        """Of matrix products in this precision (fp32 without TF32, as torch does by default)."""
        return self.flops_fp32 if precision == "fp32" else self.flops_16_bit


# Data sheets: NVIDIA's of A10, A100, B200, H100 SXM, H200, L4, L40S, RTX 4090, V100 SXM2; AMD's of the MI300X. Memory as
# the driver gives it to a program (with error correction where that is on by default). Then, of the same sheets, bytes a second of
# memory and of NVLink or Infinity Fabric, one way (half of what is advertised); without those, of 16 lanes of PCIe 4. Last
# the network of the maker's own node: DGX-1 4 x 100, DGX A100 8 x 200, DGX H100, H200 and B200 8 x 400, AMD's MI300X platform 8 x 400
# Gbit/s; of the others there is none, and one card of 100 Gbit/s is assumed.
_TABLE = {
    "a10-24gb": (22.0, 125e12, 31.2e12, 600e9, 32e9, 12.5e9),
    "a100-40gb": (39.4, 312e12, 19.5e12, 1555e9, 300e9, 200e9),
    "a100-80gb": (79.1, 312e12, 19.5e12, 2039e9, 300e9, 200e9),
    "b200-180gb": (178.0, 2250e12, 80e12, 8000e9, 900e9, 400e9),
    "h100-80gb": (79.1, 989e12, 67e12, 3350e9, 450e9, 400e9),
    "h200-141gb": (139.7, 989e12, 67e12, 4800e9, 450e9, 400e9),
    "l4-24gb": (22.0, 121e12, 30.3e12, 300e9, 32e9, 12.5e9),
    "l40s-48gb": (44.4, 362e12, 91.6e12, 864e9, 32e9, 12.5e9),
    "mi300x-192gb": (191.0, 1307e12, 163.4e12, 5300e9, 448e9, 400e9),
    "rtx4090-24gb": (23.5, 165e12, 82.6e12, 1008e9, 32e9, 12.5e9),
    "v100-32gb": (31.7, 125e12, 15.7e12, 900e9, 150e9, 50e9),
}


def names() -> list[str]:
    """Every known one."""
    return sorted(_TABLE)


def gpu(name: str) -> Gpu:
    """A known GPU by its name, or any other by its memory: `48gb`. Raises ConfigError.

    >>> gpu("h100-80gb").flops("bf16"), gpu("48gb").memory_bytes / GIB
    (989000000000000.0, 48.0)
    """
    name = name.lower()
    if name in _TABLE:
        memory, *rates = _TABLE[name]
        return Gpu(name, memory * GIB, *rates)
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)gb", name):
        return Gpu(name, float(found[1]) * GIB)
    close = difflib.get_close_matches(name, _TABLE, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names())}"
    raise ConfigError(f"--gpu {name!r}: not known; {hint}, or give its memory, as in 48gb")


# What a driver calls those whose data sheet is above; others of the same name (PCIe cards, NVL) are slower, and not these.
_DRIVER_NAMES = {
    r"NVIDIA A10": "a10-24gb",
    r"NVIDIA A100.*-40GB": "a100-40gb",
    r"NVIDIA A100.*[- ]80GB.*": "a100-80gb",
    r"NVIDIA B200": "b200-180gb",
    r"NVIDIA H100 80GB HBM3": "h100-80gb",
    r"NVIDIA H200": "h200-141gb",
    r"NVIDIA L4": "l4-24gb",
    r"NVIDIA L40S": "l40s-48gb",
    r"AMD Instinct MI300X.*": "mi300x-192gb",
    r"NVIDIA GeForce RTX 4090": "rtx4090-24gb",
    r"Tesla V100-SXM2-32GB.*": "v100-32gb",
}


def of_driver(name: str) -> Gpu | None:
    """The GPU that a driver calls so, if its data sheet is known.

    >>> of_driver("NVIDIA H100 80GB HBM3").name, of_driver("NVIDIA H100 PCIe")
    ('h100-80gb', None)
    """
    return next((gpu(ours) for theirs, ours in _DRIVER_NAMES.items() if re.fullmatch(theirs, name)), None)
