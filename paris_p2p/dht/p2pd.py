"""The libp2p daemon (p2pd, bundled with hivemind) as a child of the DHT worker.

Owns: starting it, naming why it does not start, noticing its end, ending it. Does not own: what is said
through it. Started here rather than by hivemind, which reports one message for every cause, watches
nothing, and leaves it running (and its sockets lying in /tmp) when the worker is killed.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paris_p2p.dht.addresses import HostPort, host_port
from paris_p2p.errors import ConfigError, NetworkError, ParisError

START_DEADLINE_S = 15.0
_STOP_GRACE_S = 1.0
_TAIL_LINES = 20
_READY = "Peer ID:"
_SOCKET_NAME = "p2pd.sock"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# part of p2pd's last lines -> what is wrong, in the operator's words
_CAUSES: tuple[tuple[str, type[ParisError], str], ...] = (
    ("address already in use", NetworkError, "the port is taken by another program"),
    (
        "cannot assign requested address",
        NetworkError,
        "no network interface here has that address",
    ),
    ("permission denied", NetworkError, "this user may not listen there (ports below 1024 need privileges)"),
    ("address family not supported", NetworkError, "this machine has no IPv6; listen on /ip4/… only"),
    ("failed to parse multiaddr", ConfigError, "an address is not a multiaddr"),
    ("invalid wire-format", ConfigError, "its key file is damaged; delete it to get a new one"),
)


@dataclass(frozen=True, slots=True)
class P2pdOptions:
    """`folder`: private, for the sockets. `relays`: checked bootstrap addresses, which may relay for us.
    `client_mode`: dial only, listen nowhere."""

    folder: Path
    key_path: Path
    listen: tuple[str, ...]
    announce: tuple[str, ...]
    relays: tuple[str, ...]
    client_mode: bool


class P2pd:
    """A running daemon. `control`: the multiaddr of its control socket."""

    def __init__(
        self, process: asyncio.subprocess.Process, folder: Path, reading: "asyncio.Task[None]"
    ) -> None:
        self.pid = process.pid
        self.control = f"/unix{folder / _SOCKET_NAME}"
        self._process = process
        self._reading = reading

    async def wait(self) -> int:
        """Wait for its end; its exit status (negative: a signal's number)."""
        return await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL; returns when it is gone."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signum)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _STOP_GRACE_S)
                break
        await self._process.wait()
        self._reading.cancel()


async def start_p2pd(binary: Path, options: P2pdOptions) -> P2pd:
    """Start the daemon and wait until it serves. Raises `NetworkError` or `ConfigError` naming the cause.

    `options.listen` has been through `usable_listen`.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            str(binary),
            *_arguments(options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "GOLOG_LOG_LEVEL": "error"},
            preexec_fn=_death_signal_setter(),
        )
    except OSError as error:
        raise NetworkError(f"the libp2p daemon {binary} cannot be run here: {error}") from error
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    daemon = P2pd(process, options.folder, asyncio.create_task(_read_output(process, ready, tail)))
    try:
        await asyncio.wait_for(ready, START_DEADLINE_S)
    except TimeoutError:
        await daemon.stop()
        said = " | ".join(tail) or "nothing"
        raise NetworkError(
            f"the libp2p daemon was not ready within {START_DEADLINE_S:.0f} s; it said: {said}"
        ) from None
    except EOFError:
        await daemon.stop()
        raise diagnose(list(tail), options.listen) from None
    return daemon


def _arguments(options: P2pdOptions) -> list[str]:
    arguments = [
        f"-listen=/unix{options.folder / _SOCKET_NAME}",
        f"-id={options.key_path}",
        "-dhtClient=1" if options.client_mode else "-dhtServer=1",
        "-connManager=1",
        "-idleTimeout=30s",
        # UPnP and reachability probes make no sense, and noise, where nobody outside can come in
        f"-natPortMap={int(_public(options))}",
        f"-autonat={int(_public(options))}",
    ]
    if options.client_mode:
        arguments.append("-noListenAddrs=1")
    else:
        arguments.append(f"-hostAddrs={','.join(options.listen)}")
    if options.announce:
        arguments.append(f"-announceAddrs={','.join(options.announce)}")
    # without this the daemon counts the public IPFS nodes as its relays
    arguments.append(f"-bootstrapPeers={','.join(options.relays)}")
    return arguments


def _public(options: P2pdOptions) -> bool:
    hosts = [place.host for place in map(host_port, options.listen) if place is not None]
    return not options.client_mode and any(not host.startswith("127.") and host != "::1" for host in hosts)


def _death_signal_setter() -> Callable[[], None] | None:
    """Runs between fork and exec: the daemon is killed when the worker dies, however it dies (Linux).

    Elsewhere the daemon's idle timeout ends it.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def set_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)

    return set_death_signal


async def _read_output(
    process: asyncio.subprocess.Process, ready: "asyncio.Future[None]", tail: "deque[str]"
) -> None:
    """Read until the end, so that the daemon never blocks on its output; what it says goes to our stderr."""
    assert process.stdout is not None
    while data := await process.stdout.read(4096):
        text = data.decode(errors="replace")
        tail.extend(line for line in text.splitlines() if line.strip())
        if not ready.done() and any(_READY in line for line in tail):
            ready.set_result(None)
        elif ready.done():
            print(text, end="", file=sys.stderr, flush=True)
    if not ready.done():
        ready.set_exception(EOFError())


def diagnose(lines: Sequence[str], listen: Sequence[str]) -> ParisError:
    """The error that p2pd's last lines amount to."""
    text = " | ".join(lines)
    where = ", ".join(listen)
    for part, kind, meaning in _CAUSES:
        if part in text:
            return kind(f"cannot listen on {where}: {meaning} ({lines[-1]})")
    return NetworkError(
        f"the libp2p daemon did not start (listening on {where}): {text or 'it said nothing'}"
    )


def usable_listen(listen: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The addresses of `listen` that can be listened on, and what is wrong with each other one.

    A machine without IPv6, or without one of several interfaces, serves on what it has. Raises
    `NetworkError` when nothing is left, and when a fixed port is taken: p2pd itself would not notice another
    p2pd there, as it shares ports (SO_REUSEPORT).
    """
    unusable: dict[str, ParisError] = {}
    for address in listen:
        place = host_port(address)
        if place is None or place.transport != "tcp":
            continue
        error = _bind_error(place)
        if error is not None and error.errno == errno.EADDRINUSE:
            raise NetworkError(
                f"port {place.port} is taken: another program (or another paris-p2p) listens on {address}; "
                "stop it or choose another port with --listen"
            )
        if error is not None:
            unusable[address] = diagnose([os.strerror(error.errno or 0).lower()], [address])
    usable = tuple(address for address in listen if address not in unusable)
    if unusable and not usable:
        raise next(iter(unusable.values()))
    return usable, {address: f"{error}; going on with the others" for address, error in unusable.items()}


def _bind_error(place: HostPort) -> OSError | None:
    """What the system says when one binds there."""
    ip6 = place.host_kind == "ip6"
    try:
        with socket.socket(socket.AF_INET6 if ip6 else socket.AF_INET) as probe:
            # connections just closed do not count
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ip6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((place.host, place.port))
    except OSError as error:
        return error
    return None
