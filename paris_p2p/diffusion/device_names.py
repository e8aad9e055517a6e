"""What a device may be called, told without torch, whose import takes seconds.

Owns: the forms of names. Does not own: whether such a device is there (`devices`).
"""

import re

from paris_p2p.errors import ConfigError

CUDA_INDEX = re.compile(r"cuda:(0|[1-9][0-9]{0,2})")
SEVERAL = re.compile(r"(?:cuda|cpu):x([2-9]|[1-9][0-9])")
_PLAIN = ("auto", "cpu", "cuda", "cuda:all", "mps")


def check_device_name(name: str) -> None:
    """Raises `ConfigError` unless `name` is a device's on some machine."""
    if name not in _PLAIN and not CUDA_INDEX.fullmatch(name) and not SEVERAL.fullmatch(name):
        raise ConfigError(
            f"--device {name!r}: there are auto, cpu, cuda, cuda:N (N from 0) and mps; for a trainer also "
            "cuda:all, cuda:xN and cpu:xN (N from 2 to 99)"
        )
