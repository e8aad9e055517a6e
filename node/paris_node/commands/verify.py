"""`paris-node verify`: hash everything in the home's store again, and set what is damaged aside."""

from dataclasses import dataclass, field

from paris_node.sizes import WORTH_SAYING_BYTES
from paris_p2p import clock
from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.ids import InfoHash
from paris_p2p.programs import EXIT_DONE, EXIT_INCOMPLETE, Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.home import Home


@dataclass(slots=True)
class _Tally:
    items: int = 0
    checked_bytes: int = 0
    damaged: list[str] = field(default_factory=list)


def run(home: Home, output: Output) -> int:
    """Check every complete item; `EXIT_INCOMPLETE` when one was damaged."""
    if not home.has_store:
        raise ConfigError(f"nothing was ever stored in {home.path}: name the node's folder with --home")
    store, tally, started = home.store(), _Tally(), clock.monotonic()
    for info_hash in store.ids():
        _check(store, info_hash, tally, output)
    seconds = clock.monotonic() - started
    partial = len(store.holdings()) - len(store.ids())
    items = "1 item" if tally.items == 1 else f"{tally.items} items"
    summary = f"{items}, {tally.checked_bytes / 1e6:.1f} MB hashed in {seconds:.1f} s"
    if partial:
        summary += f"; {partial} half fetched, which are checked when their fetch goes on"
    if tally.damaged:
        summary += (
            f"; {len(tally.damaged)} damaged: they are served no more, and a fetch (a running node's too) "
            "replaces their bad pieces only"
        )
    output.event(
        "verified",
        summary,
        items=tally.items,
        damaged=tally.damaged,
        partial=partial,
        bytes=tally.checked_bytes,
        seconds=round(seconds, 3),
    )
    return EXIT_INCOMPLETE if tally.damaged else EXIT_DONE


def _check(store: ContentStore, info_hash: InfoHash, tally: _Tally, output: Output) -> None:
    if not store.has(info_hash):
        return  # a running node removed it meanwhile
    item = info_hash.hex()
    tally.items += 1
    try:
        layout = store.layout(info_hash)
        name, length, pieces = layout.name, layout.length, layout.pieces
    except StoreError:
        name, length, pieces = "", 0, 0  # its metadata is damaged: `verify` says what is left of it
    if length >= WORTH_SAYING_BYTES:
        output.say(f"{item[:16]}…  {length:>13}  {name}  …")
    try:
        bad, reason = len(store.verify(info_hash)), ""
    except StoreError as error:
        bad, reason = pieces, str(error)
    tally.checked_bytes += length
    if bad or reason:
        tally.damaged.append(item)
    state = reason or (f"{bad} of {pieces} pieces are damaged" if bad else "good")
    output.event(
        "item", f"{item[:16]}…  {length:>13}  {name}  {state}", info_hash=item, bytes=length, bad_pieces=bad
    )
