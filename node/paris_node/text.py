"""What strangers wrote, made fit for a terminal."""


def printable(text: str) -> str:
    """`text` without control characters: a run's or a peer's name must not steer the reader's terminal."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
