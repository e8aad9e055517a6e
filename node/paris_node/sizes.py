"""Byte counts and times as people type them: `500k`, `2.5M`, `20G`, `4Gi`; `90s`, `30m`, `12h`, `7d`.

Owns: reading them, and the limits that are made of them. Does not own: showing them (`views.human_bytes`).
"""

import re

from paris_p2p.errors import ConfigError
from paris_p2p.net.limits import SwarmLimits

WORTH_SAYING_BYTES = 2 << 30
"""So much to hash takes seconds, in which people want to know what is going on."""
_POWERS = "kMGT"
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
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


def parse_seconds(text: str, option: str) -> float:
    """The number of seconds `text` names. Raises `ConfigError` naming `option`."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([smhd]?)", text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if seconds <= 0:
        raise ConfigError(f"{option} {text}: a time such as 90s, 30m, 12h or 7d is expected")
    return seconds


def parse_ratio(text: str, option: str) -> float:
    """The positive number `text` names. Raises `ConfigError` naming `option`."""
    match = re.fullmatch(r"\d{1,9}(?:\.\d{1,6})?", text.strip())
    ratio = float(match[0]) if match else 0.0
    if ratio <= 0:
        raise ConfigError(f"{option} {text}: a number above 0 such as 1 or 2.5 is expected")
    return ratio


def read_limits(
    up: str | None, down: str | None, seed_ratio: str | None = None, seed_time: str | None = None
) -> SwarmLimits:
    """What `--limit-up`, `--limit-down`, `--seed-ratio` and `--seed-time` say. Raises `ConfigError`."""
    return SwarmLimits(
        read_bytes(up, "--limit-up"),
        read_bytes(down, "--limit-down"),
        seed_ratio=None if seed_ratio is None else parse_ratio(seed_ratio, "--seed-ratio"),
        seed_time_s=None if seed_time is None else parse_seconds(seed_time, "--seed-time"),
    )
