"""Seeds: one recipe seed, many independent streams.

Owns: deriving a stream's seed from a recipe's seed and the stream's name. Does not own: what is drawn.
"""

import hashlib

import torch


def derived_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for the stream named `parts`: unrelated for other names, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *parts: str | int) -> torch.Generator:
    """A CPU generator for the stream `parts`. On the CPU, so that draws do not depend on the device."""
    return torch.Generator("cpu").manual_seed(derived_seed(seed, *parts))
