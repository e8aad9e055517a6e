"""`paris-node delegate`: the organiser lets one node claim roles of a restricted run."""

import re
from datetime import UTC, datetime
from pathlib import Path

from paris_node.commands.publish import load_prepared
from paris_p2p import clock
from paris_p2p.core.access import is_named
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.home import Home
from paris_p2p.wire.access_pass import Pass, pass_text, sign_pass
from paris_p2p.wire.identity import node_id_from_peer_id, peer_id_text

_DURATION = re.compile(r"([1-9][0-9]{0,4})([hdw])")
_SECONDS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


def run(folder: Path, peer: str, expires: str, home: Path | None, output: Output) -> None:
    """Print a pass for `peer` to the run prepared in `folder`."""
    signed = load_prepared(folder)
    node = node_id_from_peer_id(peer)
    organiser = Home.resolve(home).identity()
    if organiser.node_id != signed.manifest.organiser:
        raise ConfigError(
            f"only the run's organiser, {peer_id_text(signed.manifest.organiser)}, can give passes: choose "
            "the --home that the run was prepared with"
        )
    if is_named(signed.manifest, node):
        raise ConfigError(
            f"{peer} needs no pass: the run is open, or names it"
            if node != organiser.node_id
            else "the organiser needs no pass"
        )
    now_unix = clock.unix()
    leave = Pass(signed.run_id, node, expiry(expires, now_unix))
    line = pass_text(sign_pass(leave, organiser))
    until = datetime.fromtimestamp(leave.expires_unix, UTC).isoformat(timespec="minutes")
    output.event(
        "delegated",
        line,
        run_id=signed.run_id.hex(),
        node=peer,
        expires_unix=leave.expires_unix,
        **{"pass": line},
    )
    output.say(f"good until {until}; next, there: paris-node join … --pass FILE (a file with the line above)")


def expiry(text: str, now_unix: float) -> int:
    """When `text` (`12h`, `30d`, `8w`, or a UTC date) is, in unix seconds. Raises `ConfigError`."""
    if duration := _DURATION.fullmatch(text):
        return int(now_unix) + int(duration[1]) * _SECONDS[duration[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--expires {text!r}: say 12h, 30d, 8w or a date such as 2027-01-31") from None
    unix = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if unix <= now_unix:
        raise ConfigError(f"--expires {text}: that is past")
    return int(unix)
