"""The states of a claim and the moves between them: one table.

Owns: the table and its check. Does not own: what is done in a state (`core.lease`).
"""

from enum import Enum

from paris_p2p.errors import LocalProtocolError


class State(Enum):
    """`BIDDING`: a BID is written and settling; `CONFIRMING`: a HOLD is, half as long; `ADRIFT`: the lease is
    over because the network is away, the trainer goes on for itself; `BACKOFF`: waiting after a loss or a
    failure; `ENDED`: left for good."""

    IDLE = "idle"
    BIDDING = "bidding"
    CONFIRMING = "confirming"
    HOLDING = "holding"
    ADRIFT = "adrift"
    BACKOFF = "backoff"
    ENDED = "ended"


class Event(Enum):
    """`LOST`: a rival ranks first; `DOUBT`: we cannot know whether others still see our claim; `CUT_OFF`: the
    same, and a trainer is under way whose work need not be lost."""

    CHOSEN = "chosen"
    WON = "won"
    LOST = "lost"
    DOUBT = "doubt"
    CUT_OFF = "cut off"
    RESTED = "rested"
    FINISHED = "finished"
    FAILED = "failed"
    RELEASED = "released"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.IDLE, Event.CHOSEN): State.BIDDING,
    (State.BIDDING, Event.WON): State.CONFIRMING,
    (State.BIDDING, Event.LOST): State.BACKOFF,
    (State.BIDDING, Event.DOUBT): State.BACKOFF,
    (State.CONFIRMING, Event.WON): State.HOLDING,
    (State.CONFIRMING, Event.LOST): State.BACKOFF,
    (State.CONFIRMING, Event.DOUBT): State.BACKOFF,
    (State.HOLDING, Event.LOST): State.BACKOFF,
    (State.HOLDING, Event.CUT_OFF): State.ADRIFT,
    (State.ADRIFT, Event.CHOSEN): State.BIDDING,
    (State.BIDDING, Event.CUT_OFF): State.ADRIFT,
    (State.CONFIRMING, Event.CUT_OFF): State.ADRIFT,
    (State.ADRIFT, Event.LOST): State.BACKOFF,
    (State.ADRIFT, Event.FINISHED): State.IDLE,
    (State.ADRIFT, Event.FAILED): State.BACKOFF,
    (State.HOLDING, Event.FINISHED): State.IDLE,
    (State.HOLDING, Event.FAILED): State.BACKOFF,
    (State.BACKOFF, Event.RESTED): State.IDLE,
    (State.IDLE, Event.RELEASED): State.ENDED,
    (State.BIDDING, Event.RELEASED): State.ENDED,
    (State.CONFIRMING, Event.RELEASED): State.ENDED,
    (State.HOLDING, Event.RELEASED): State.ENDED,
    (State.ADRIFT, Event.RELEASED): State.ENDED,
    (State.BACKOFF, Event.RELEASED): State.ENDED,
}


def transition(state: State, event: Event) -> State:
    """The state after `event`; `LocalProtocolError` naming both when the table has no such entry."""
    if (state, event) not in TRANSITIONS:
        raise LocalProtocolError(f"a lease cannot take {event.name} while {state.name}")
    return TRANSITIONS[state, event]
