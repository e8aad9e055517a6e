"""Messages between the DHT client (the node process) and the DHT worker (its child).

Owns: names and fields, so that both ends agree. Does not own: frames (`workers.frames`). Down: `start` once,
then requests with an `id`, `stop`. Up: `ready` or `failed` once, then answers with the request's `id`, and
`warning` at any time.
"""

from dataclasses import asdict, dataclass
from typing import Any

STOPPED_STATUS = 0
DAEMON_DIED_STATUS = 71
"""Exit status of a worker whose p2pd ended: start it again."""
FAILED_STATUS = 72
"""Exit status of a worker that said `failed` (with the cause) and left."""

KEYS_PER_READ = 16
"""With every key full (1024 records of 1 KiB) the answer still fits a frame."""
RECORDS_PER_STORE = 256


@dataclass(frozen=True, slots=True)
class StartMessage:
    """`must_join`: fail when no bootstrap node can be joined (the first start; a restart keeps trying)."""

    folder: str
    key_path: str
    listen: list[str]
    announce: list[str]
    bootstrap: list[str]
    client_mode: bool
    must_join: bool

    def message(self) -> dict[str, Any]:
        """As it is sent."""
        return {"type": "start", **asdict(self)}

    @classmethod
    def parse(cls, message: dict[str, Any]) -> "StartMessage":
        """From what was received; the two ends are the same program."""
        return cls(**{name: value for name, value in message.items() if name != "type"})
