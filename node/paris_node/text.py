"""Text for a terminal: what strangers wrote made fit for one, counts in words."""


def printable(text: str) -> str:
    """`text` without control characters: a run's or a peer's name must not steer the reader's terminal."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def counted(count: int, one: str, many: str = "") -> str:
    """`1 peer`, `2 peers`; `many` where that is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def human_seconds(seconds: float | None) -> str:
    """A duration for people: `45s`, `3m20s`, `2h05m`; a dash when unknown."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
