"""Byte counts as people type them: `500k`, `2.5M`, `20G`, `4Gi`.

Owns: reading them, and the limits that are made of them. Does not own: showing them (`views.human_bytes`).
"""

import re

from paris_p2p.errors import ConfigError
from paris_p2p.net.limits import SwarmLimits

_POWERS = "kMGT"
_FORM = re.compile(rf"(\d{{1,15}}(?:\.\d{{1,6}})?)\s*(?:([{_POWERS}])(i?))?B?")


def parse_bytes(text: str, option: str) -> int:
    """The number of bytes `text` names. Raises `ConfigError` naming `option`."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{option} {text}: a number of bytes such as 500k, 2.5M, 20G or 4Gi is expected")
    step = 1024 if match[3] else 1000
    count = int(float(match[1]) * step ** (_POWERS.index(match[2]) + 1 if match[2] else 0))
    if count <= 0:
        raise ConfigError(f"{option} {text}: leave it out for no limit")
    return count


def read_bytes(text: str | None, option: str) -> int | None:
    """As `parse_bytes`; None when the option was not given."""
    return None if text is None else parse_bytes(text, option)


def read_limits(up: str | None, down: str | None) -> SwarmLimits:
    """What `--limit-up` and `--limit-down` say. Raises `ConfigError`."""
    return SwarmLimits(read_bytes(up, "--limit-up"), read_bytes(down, "--limit-down"))
