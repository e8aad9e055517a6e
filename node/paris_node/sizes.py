"""Byte counts and times as people type them: `500k`, `2.5MB`, `20G`, `4GiB`; `90s`, `30m`, `12h`, `7d`.

Owns: reading them, and the limits that are made of them. Does not own: showing them (`views.human_bytes`).
"""

import re

from paris_p2p.errors import ConfigError
from paris_p2p.net.limits import SwarmLimits
from paris_p2p.wire.content import MAX_PIECE_LENGTH, MIN_PIECE_LENGTH

WORTH_SAYING_BYTES = 2 << 30
"""So much to hash takes seconds, in which people want to know what is going on."""
_POWERS = "kmgt"
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_FORM = re.compile(rf"([0-9]{{1,15}}(?:\.[0-9]{{1,6}})?)\s*(?:([{_POWERS}])(i?))?b?", re.IGNORECASE)


def parse_bytes(text: str, option: str) -> int:
    """The number of bytes `text` names: k, M, G and T are powers of 1000, Ki, Mi, Gi and Ti of 1024, in upper
    or lower case, with or without B. Raises `ConfigError` naming `option`."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{option} {text}: a number of bytes such as 500k, 2.5MB, 20G or 4GiB is expected")
    step = 1024 if match[3] else 1000
    count = int(float(match[1]) * step ** (_POWERS.index(match[2].lower()) + 1 if match[2] else 0))
    if count <= 0:
        raise ConfigError(f"{option} {text}: leave it out for no limit")
    return count


def read_bytes(text: str | None, option: str) -> int | None:
    """As `parse_bytes`; None when the option was not given."""
    return None if text is None else parse_bytes(text, option)


def check_piece_length(length: int | None) -> None:
    """Raises `ConfigError` unless `--piece-length` was left out or is one that content items may have."""
    if length is None or (MIN_PIECE_LENGTH <= length <= MAX_PIECE_LENGTH and not length & (length - 1)):
        return
    raise ConfigError(
        f"--piece-length {length}: a power of two from {MIN_PIECE_LENGTH} to {MAX_PIECE_LENGTH} bytes is "
        "expected, such as 65536; left out, it fits the size"
    )


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
    up: str | None,
    down: str | None,
    peer_up: str | None = None,
    peer_down: str | None = None,
    *,
    seed_ratio: str | None = None,
    seed_time: str | None = None,
) -> SwarmLimits:
    """What `--limit-up`, `--limit-down`, `--peer-limit-up`, `--peer-limit-down`, `--seed-ratio` and
    `--seed-time` say. Raises `ConfigError`."""
    return SwarmLimits(
        read_bytes(up, "--limit-up"),
        read_bytes(down, "--limit-down"),
        read_bytes(peer_up, "--peer-limit-up"),
        read_bytes(peer_down, "--peer-limit-down"),
        seed_ratio=None if seed_ratio is None else parse_ratio(seed_ratio, "--seed-ratio"),
        seed_time_s=None if seed_time is None else parse_seconds(seed_time, "--seed-time"),
    )
