"""The states of a claim and the moves between them: one table.

Owns: the table and its check. Does not own: what is done in a state (`core.lease`).
"""

from enum import Enum

from paris_p2p.errors import LocalProtocolError


class State(Enum):
    """`BIDDING`: a BID is written and settling; `CONFIRMING`: a HOLD is, half as long; `BACKOFF`: waiting
    after a loss or a failure; `ENDED`: left for good."""

    IDLE = "idle"
    BIDDING = "bidding"
    CONFIRMING = "confirming"
    HOLDING = "holding"
    BACKOFF = "backoff"
    ENDED = "ended"


class Event(Enum):
    """`LOST`: a rival ranks first; `DOUBT`: we cannot know whether others still see our claim."""

    CHOSEN = "chosen"
    WON = "won"
    LOST = "lost"
    DOUBT = "doubt"
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
    (State.HOLDING, Event.DOUBT): State.BACKOFF,
    (State.HOLDING, Event.FINISHED): State.IDLE,
    (State.HOLDING, Event.FAILED): State.BACKOFF,
    (State.BACKOFF, Event.RESTED): State.IDLE,
    (State.IDLE, Event.RELEASED): State.ENDED,
    (State.BIDDING, Event.RELEASED): State.ENDED,
    (State.CONFIRMING, Event.RELEASED): State.ENDED,
    (State.HOLDING, Event.RELEASED): State.ENDED,
    (State.BACKOFF, Event.RELEASED): State.ENDED,
}


def transition(state: State, event: Event) -> State:
    """The state after `event`; `LocalProtocolError` naming both when the table has no such entry."""
    if (state, event) not in TRANSITIONS:
        raise LocalProtocolError(f"a lease cannot take {event.name} while {state.name}")
    return TRANSITIONS[state, event]
