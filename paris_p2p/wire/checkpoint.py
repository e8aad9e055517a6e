"""The checkpoint statement: a trainer's signed word about one checkpoint.

It has no expiry of its own: any peer that holds the checkpoint may announce it again (`AnnounceRecord`)
long after the trainer has gone, and nobody can alter it.
"""

import hashlib
from dataclasses import dataclass

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import NodeId, Role, RunId, Term
from paris_p2p.wire import canonical
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity, verify
from paris_p2p.wire.terms import MAX_TERM

MAX_STATEMENT_BYTES = 640
CACHED_STATEMENTS = 8192
_CONTEXT = b"paris-p2p checkpoint 1\0"


@dataclass(frozen=True, slots=True)
class CheckpointStatement:
    """`holder` says: in (`role`, `term`) I reached `step` of `total_steps`.

    `weights`: the item with the EMA weights (`diffusion_pytorch_model.safetensors`, `config.json`);
    `resume`: the item with everything a successor needs to go on; `parent`: the info-hash of the resume
    item this lineage started from, empty for a fresh start; `heldout_loss`: of the EMA weights;
    `variant`: index of the expert variant in the recipe (0 for the router).
    """

    run_id: RunId
    role: Role
    term: Term
    holder: NodeId
    step: int
    total_steps: int
    variant: int
    weights: ContentRef
    resume: ContentRef
    parent: bytes
    heldout_loss: float
    created_unix: float

    def __post_init__(self) -> None:
        if len(self.run_id) != 32 or len(self.holder) != 32 or len(self.parent) not in (0, 32):
            raise ValueError("run_id, holder or parent has a wrong length")
        if not 0 <= self.step <= self.total_steps or not 1 <= self.term <= MAX_TERM or self.variant < 0:
            raise ValueError("step, term or variant out of range")

    @property
    def finished(self) -> bool:
        """Whether the role's training is complete."""
        return self.step == self.total_steps


@dataclass(frozen=True, slots=True)
class _Envelope:
    body: bytes
    signature: bytes


def sign_statement(statement: CheckpointStatement, holder: Identity) -> bytes:
    """The signed bytes of `statement`, made by its holder."""
    body = canonical.encode(statement)
    return canonical.encode(_Envelope(body, holder.sign(_CONTEXT + body)))


def statement_digest(data: bytes) -> bytes:
    """What an attestation names a signed statement by: SHA-256 of its bytes."""
    return hashlib.sha256(data).digest()


def check_statement(data: bytes) -> CheckpointStatement:
    """The statement in `data` if its holder signed it; else `RemoteProtocolError`.

    The last `CACHED_STATEMENTS` answers are remembered, refusals too: several parts of a node ask for the
    same ones, and an answer takes half a millisecond to find. It is no more than that: a crowd of keys can
    push any of them out.
    """
    data = bytes(data)
    found = _answers.pop(data, None) or _answer(data)
    _answers[data] = found  # to the end, as the one asked for last
    if len(_answers) > CACHED_STATEMENTS:
        _answers.pop(next(iter(_answers)), None)
    if isinstance(found, str):
        raise RemoteProtocolError(found)
    return found


_answers: dict[bytes, CheckpointStatement | str] = {}


def _answer(data: bytes) -> CheckpointStatement | str:
    """The statement, or why there is none."""
    try:
        return _check(data)
    except RemoteProtocolError as error:
        return str(error)


def _check(data: bytes) -> CheckpointStatement:
    envelope = canonical.decode(_Envelope, data, MAX_STATEMENT_BYTES)
    statement = canonical.decode(CheckpointStatement, envelope.body, MAX_STATEMENT_BYTES)
    if not verify(statement.holder, _CONTEXT + envelope.body, envelope.signature):
        raise RemoteProtocolError("the checkpoint statement is not signed by its holder")
    return statement
