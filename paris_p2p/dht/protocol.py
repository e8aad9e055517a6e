"""Messages between the DHT client (the node process) and the DHT worker (its child).

Owns: names and fields, so that both ends agree. Does not own: frames (`workers.frames`). Down: `start` once,
then requests with an `id`, `stop`. Up: `ready` or `failed` once, then answers with the request's `id`, and
at any time `notice` (something is wrong, or no longer) and `peers` (who answered and who did not).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

STOPPED_STATUS = 0
DAEMON_DIED_STATUS = 71
"""Exit status of a worker whose p2pd ended: start it again."""
FAILED_STATUS = 72
"""Exit status of a worker that said `failed` (with the cause) and left."""

KEYS_PER_READ = 16
"""With every key full (`MAX_ROWS_A_KEY` records of 1 KiB) the answer still fits a frame."""
MAX_ROWS_A_KEY = 1536
"""Records of one key that the worker hands on. A node keeps 1024, but each of the twenty that are asked may
tell of others, and hostile ones make as many as they like."""
ROWS_A_READ = 8192
"""Records of all its keys that one read hands on: as many as the node process remembers to have verified."""
MAX_VOUCHED = 64
"""Owners that the node process vouches for."""
RECORDS_PER_STORE = 256


Trouble = Literal[
    "bootstrap",  # one does not answer, or is not sound
    "alone",  # no other node answers
    "split",  # parts of the network do not know each other
    "clock",  # this machine's clock is wrong
    "listen",  # one of several listen addresses cannot be used
    "worker",  # the worker or its daemon died, hangs, or does not start
    "identity",  # somebody else writes with this node's key
    "peers",  # the known peers cannot be kept
]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something is wrong with the network side (`active`), or no longer. `subject` tells notices of one kind
    apart (an address; mostly empty); `text` says what it is and what to do."""

    kind: Trouble
    subject: str
    text: str
    active: bool = True

    def message(self) -> dict[str, Any]:
        """As it is sent."""
        return {"type": "notice", **asdict(self)}

    @classmethod
    def parse(cls, message: dict[str, Any]) -> "Notice":
        """From what was received."""
        return cls(message["kind"], message["subject"], message["text"], message["active"])


@dataclass(frozen=True, slots=True)
class StartMessage:
    """`must_join`: fail when no node can be joined (the first start; a restart keeps trying). `known`:
    addresses of peers that answered in earlier times, tried when bootstrap nodes keep us waiting.
    `daemon_hung_s`: a p2pd that does not answer for so long hangs."""

    folder: str
    key_path: str
    listen: list[str]
    announce: list[str]
    bootstrap: list[str]
    known: list[str]
    client_mode: bool
    must_join: bool
    daemon_hung_s: float

    def message(self) -> dict[str, Any]:
        """As it is sent."""
        return {"type": "start", **asdict(self)}

    @classmethod
    def parse(cls, message: dict[str, Any]) -> "StartMessage":
        """From what was received; the two ends are the same program."""
        return cls(**{name: value for name, value in message.items() if name != "type"})
