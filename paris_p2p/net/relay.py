"""What a public node does for nodes that cannot be dialled: dials them back, keeps their reservations, joins
two connections to a circuit. All of it within `core.relay`'s budgets.

Owns: the serving side of `docs/protocol/reachability.md`. Does not own: listening (`net.tls` hands over the
connections that begin with its magic), the asking side (`net.circuits`).

A relay copies bytes that it can neither read nor change unnoticed: the two ends speak TLS through it.
"""

import logging
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import trio

from paris_p2p.core.relay import Quota, RelayBudget, RelayLedger, host_key
from paris_p2p.errors import ParisError, RemoteProtocolError, TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import Endpoint
from paris_p2p.net.raw import ASK_S, close, receive_exactly, receive_into, seen_from, send_all, within
from paris_p2p.open_files import fitting
from paris_p2p.wire import reach
from paris_p2p.wire.identity import peer_id_text, verify
from paris_p2p.wire.reach import Answer, Ask, Opening, Status

_log = logging.getLogger(__name__)

PING_S = 20.0
PONG_S = 15.0
MEET_S = 8.0  # for the dialled node to come to the relay
MAX_WAITING = 64  # circuits that wait for the dialled node
COPY_BYTES = 64 * 1024
DIAL_BACK_S = 3.0
GOODBYE_S = 5.0  # for the other end to be done, too
MAX_CALLERS = 512
MAX_CALLERS_PER_HOST = 64  # who says nothing on all of them shuts out nobody but itself

DialBack = Callable[[NodeId, Endpoint], Awaitable[None]]
"""Connects to a node and proves that it is this one, then leaves. Raises `TransportError`."""


class _Spent(Exception):
    """A circuit has had its bytes."""


@dataclass(slots=True)
class _Reservation:
    node_id: NodeId
    sock: socket.socket
    writing: trio.Lock
    unanswered: int = 0  # pings


@dataclass(slots=True)
class _Meeting:
    """A dialler waits here until the dialled node brings the token."""

    target: NodeId
    came: trio.Event
    over: trio.Event
    sock: socket.socket | None = None
    host: Endpoint | None = None


class RelayService:
    """Serves the connections handed to it. `budget` None: only dials back, relays nothing."""

    def __init__(self, own: NodeId, dial_back: DialBack, budget: RelayBudget | None) -> None:
        self._own = own
        self._dial_back = dial_back
        self.relays = budget is not None
        self.ledger = RelayLedger(budget or RelayBudget(), trio.current_time())
        self._callers = Quota(fitting(MAX_CALLERS), MAX_CALLERS_PER_HOST)
        self._reserved: dict[NodeId, _Reservation] = {}
        self._meetings: dict[bytes, _Meeting] = {}

    async def serve(self, sock: socket.socket) -> None:
        """One connection, from its opening to its end. Never raises for what a peer does."""
        try:
            caller = seen_from(sock)
            await self._within_callers(sock, caller)
        except (ParisError, OSError) as error:
            _log.debug("serving a caller failed: %s", error)
        finally:
            close(sock)

    async def _within_callers(self, sock: socket.socket, caller: Endpoint) -> None:
        host = host_key(caller.host)
        if not self._callers.take(host):
            return
        try:
            with within(ASK_S, "an opening"):
                opening = reach.decode_opening(await receive_exactly(sock, reach.OPENING_BYTES))
            await self._answer(opening, sock, caller)
        finally:
            self._callers.give(host)

    async def _answer(self, opening: Opening, sock: socket.socket, caller: Endpoint) -> None:
        if opening.ask is Ask.PROBE:
            await self._probe(opening, sock, caller)
        elif opening.ask is Ask.RESERVE:
            await self._reserve(opening, sock, caller)
        elif not self.relays:
            await _say(sock, Answer(Status.BUSY))
        elif opening.ask is Ask.DIAL:
            await self._dial(opening, sock, caller)
        else:
            await self._accept(opening, sock, caller)

    # -- dialling back ---------------------------------------------------------------------------

    async def _probe(self, opening: Opening, sock: socket.socket, caller: Endpoint) -> None:
        """Only ever the address the caller comes from: nobody can be attacked through us but the caller."""
        status = Status.BUSY
        if opening.port and self.ledger.probes.allow(host_key(caller.host), trio.current_time()):
            status = Status.UNREACHABLE
            try:
                with within(DIAL_BACK_S, "dialling back"):
                    back = Endpoint(caller.host, opening.port, tls=True)
                    await self._dial_back(reach.subject_node(opening), back)
                status = Status.OK
            except TransportError as error:
                _log.debug("dialling %s back: %s", caller.host, error)
        await _say(sock, Answer(status, caller.host, caller.port))

    # -- reservations ----------------------------------------------------------------------------

    async def _reserve(self, opening: Opening, sock: socket.socket, caller: Endpoint) -> None:
        node_id, host = reach.subject_node(opening), host_key(caller.host)
        await self._check_owner(node_id, sock)
        if not self.relays or not self.ledger.reservations.take(host):
            await _say(sock, Answer(Status.BUSY))
            return
        try:
            await _say(sock, Answer(Status.OK, caller.host, caller.port))
            await self._hold(_Reservation(node_id, sock, trio.Lock()))
        finally:
            self.ledger.reservations.give(host)

    async def _check_owner(self, node_id: NodeId, sock: socket.socket) -> None:
        nonce = os.urandom(reach.NONCE_BYTES)
        with within(ASK_S, "a proof"):
            await send_all(sock, nonce)
            proof = await receive_exactly(sock, reach.PROOF_BYTES)
        if not verify(node_id, reach.reserve_message(nonce, self._own, node_id), proof):
            raise RemoteProtocolError(f"somebody claims to be {peer_id_text(node_id)} and cannot prove it")

    async def _hold(self, reservation: _Reservation) -> None:
        """Until the node leaves. A newer reservation of a node ends its older one, which is a lost one."""
        old = self._reserved.get(reservation.node_id)
        if old is not None:
            close(old.sock)
        self._reserved[reservation.node_id] = reservation
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ping, reservation, nursery.cancel_scope)
                with suppress(TransportError):
                    await self._hear(reservation)
                nursery.cancel_scope.cancel()
        finally:
            if self._reserved.get(reservation.node_id) is reservation:
                del self._reserved[reservation.node_id]

    async def _hear(self, reservation: _Reservation) -> None:
        """Until the node is silent, or says more than it was asked: each byte is work for us."""
        while reservation.unanswered >= 0:
            with within(PING_S + PONG_S, "an answer to a ping"):
                await receive_exactly(reservation.sock, len(reach.PONG))
            reservation.unanswered -= 1
        _log.debug("%s answers what nobody asked", peer_id_text(reservation.node_id))

    async def _ping(self, reservation: _Reservation, over: trio.CancelScope) -> None:
        with suppress(TransportError):
            while True:
                await trio.sleep(PING_S)
                reservation.unanswered += 1
                await self._tell(reservation, reach.PING)
        over.cancel()

    async def _tell(self, reservation: _Reservation, token: bytes) -> None:
        async with reservation.writing:
            with within(PONG_S, "telling a node of a caller"):
                await send_all(reservation.sock, token)

    # -- circuits --------------------------------------------------------------------------------

    async def _dial(self, opening: Opening, sock: socket.socket, caller: Endpoint) -> None:
        host = host_key(caller.host)
        if not self.ledger.dials.allow(host, trio.current_time()):
            await _say(sock, Answer(Status.BUSY))
            return
        reservation = self._reserved.get(reach.subject_node(opening))
        if reservation is None:
            await _say(sock, Answer(Status.UNKNOWN))
            return
        if len(self._meetings) >= MAX_WAITING or not self.ledger.circuits.take(host):
            await _say(sock, Answer(Status.BUSY))
            return
        try:
            await self._meet(reservation, sock, caller)
        finally:
            self.ledger.circuits.give(host)

    async def _meet(self, reservation: _Reservation, sock: socket.socket, caller: Endpoint) -> None:
        token = os.urandom(reach.TOKEN_BYTES)
        meeting = _Meeting(reservation.node_id, trio.Event(), trio.Event())
        self._meetings[token] = meeting
        try:
            with trio.move_on_after(MEET_S):
                await self._tell(reservation, token)
                await meeting.came.wait()
            del self._meetings[token]
            if meeting.sock is None or meeting.host is None:
                await _say(sock, Answer(Status.UNREACHABLE))
                return
            there = meeting.host
            await _say(meeting.sock, Answer(Status.OK, caller.host, caller.port))
            await _say(sock, Answer(Status.OK, there.host, there.port))
            await self._join(sock, meeting.sock)
        finally:
            self._meetings.pop(token, None)
            meeting.over.set()

    async def _accept(self, opening: Opening, sock: socket.socket, caller: Endpoint) -> None:
        meeting = self._meetings.get(opening.subject)
        if meeting is None or meeting.sock is not None:
            await _say(sock, Answer(Status.UNKNOWN))
            return
        meeting.sock, meeting.host = sock, caller
        meeting.came.set()
        await meeting.over.wait()  # the dialler's task copies both ways

    async def _join(self, one: socket.socket, other: socket.socket) -> None:
        """Copies until one end closes, or the circuit has had its bytes or its time."""
        left = [self.ledger.budget.circuit_bytes]
        with trio.move_on_after(self.ledger.budget.circuit_s):
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._copy, one, other, left, nursery.cancel_scope)
                    nursery.start_soon(self._copy, other, one, left, nursery.cancel_scope)
            except* (_Spent, TransportError):
                _log.debug("a circuit ended, %d bytes of its budget unused", max(0, left[0]))

    async def _copy(
        self, source: socket.socket, sink: socket.socket, left: list[int], over: trio.CancelScope
    ) -> None:
        buffer = bytearray(COPY_BYTES)
        view = memoryview(buffer)
        while count := await receive_into(source, view):
            left[0] -= count
            if left[0] < 0:
                raise _Spent
            await trio.sleep(self.ledger.bucket.wait(trio.current_time()))
            self.ledger.passed(count, trio.current_time())
            await send_all(sink, view[:count])
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        over.deadline = min(over.deadline, trio.current_time() + GOODBYE_S)


async def _say(sock: socket.socket, answer: Answer) -> None:
    with within(ASK_S, "an answer"):
        await send_all(sock, answer.encode())
