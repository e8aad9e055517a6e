"""Which checkpoints may be used, and which is best: pure rules over signed statements and headers.

Owns: the conditions a checkpoint must meet before a byte of it is fetched (`refusal`), before it is used or
passed on (`loss_refusal`), whose word for that counts (`standing`), and the order in
which candidates are tried (`order_checkpoints`).
Does not own: fetching, or reading weights (`store.weights`), or who may speak at all (`core.access`).
"""

import hashlib
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import median

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import NodeId, Role
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.manifest import Architecture, Manifest, SignedManifest
from paris_p2p.wire.safetensors_header import MAX_HEADER_BYTES, tensor_bytes
from paris_p2p.wire.terms import highest_number, term_number

SIDE_FILES_BYTES = 64 << 20
"""Room in an item beside the tensors: headers, `config.json`, random states, data cursor."""
RESUME_FACTOR = 16
"""How many times the weights' bytes a resume item may hold. AdamW needs raw weights, average and two
moments in fp32: 4 times fp32 weights, 8 times bf16 ones; the rest is room for other optimizers."""

ENOUGH_WITNESSES = 2
"""So many members' words make a checkpoint count while the organiser does not publish: one may be mistaken or
a friend of the trainer's."""
LOSS_TOLERANCE = 0.05
LOSS_SLACK = 0.02
"""A loss measured again may exceed the one stated by so much: other devices round differently."""
RAW_FACTOR = 2.0
RAW_SLACK = 0.4
"""The weights that are trained on may have a loss so far above that of their average: measured, it is up to a
fifth, but a spike must not cost an honest trainer its work. 20 times `LOSS_SLACK`, for losses near zero."""
WORST_OF_BASELINE = 1.5
"""Weights whose loss exceeds that of saying nothing by this factor were not trained for this."""


class Standing(IntEnum):
    """How far a checkpoint is more than its signer's word. `REFUTED`: the organiser found it bad, or its
    signer signed something this node found bad; `UNCHECKED`: nobody whose word counts has checked it;
    `BACKED`: enough others have; `CHECKED`: this node has."""

    REFUTED = 0
    UNCHECKED = 1
    BACKED = 2
    CHECKED = 3


@dataclass(frozen=True, slots=True)
class Attestation:
    """`owner` says of a statement that its weights are `good`, or not; `loss`: as it measured it, if it
    did."""

    owner: NodeId
    good: bool
    loss: float | None


@dataclass(frozen=True, slots=True)
class Jury:
    """Whose words count. `publishing`: the organiser is here and looks at every checkpoint; `members`: who
    takes part now; `ignored`: nodes this one has caught vouching for a bad checkpoint."""

    organiser: NodeId
    publishing: bool
    members: frozenset[NodeId]
    ignored: frozenset[NodeId] = frozenset()

    def witnesses(self, holder: NodeId) -> frozenset[NodeId]:
        """Who may vouch for a checkpoint of `holder`: never the holder itself, unless it is the organiser."""
        return (self.members - {holder} | {self.organiser}) - self.ignored

    def needed(self, holder: NodeId) -> int:
        """How many of them must, the organiser not being one: two, or all of a smaller run; none when the
        holder is all there is of the run."""
        others = len(self.members - {holder} - self.ignored)
        if others == 0 and holder in self.members:
            return 0
        return max(1, min(ENOUGH_WITNESSES, others))


def standing(
    statement: CheckpointStatement, attestations: Iterable[Attestation], jury: Jury, *, checked: bool
) -> Standing:
    """The standing of a checkpoint. `checked`: this node found it good.

    The own check beats every word. That the organiser found it bad, or measured its loss and found it good,
    is enough, whoever the holder is; while it publishes, nobody else's word is, because keys are free and so
    are witnesses. Where it is away, or could check the form only, which noise has as well, `Jury.needed`
    members must vouch, the organiser perhaps among them, and more than say the opposite.
    """
    if checked:
        return Standing.CHECKED
    eligible_words = eligible(statement, attestations, jury)
    organiser = next((word for word in eligible_words if word.owner == jury.organiser), None)
    if organiser is not None and not organiser.good:
        return Standing.REFUTED
    if organiser is not None and organiser.loss is not None:
        return Standing.BACKED
    if statement.holder in jury.ignored:
        return Standing.REFUTED
    if jury.publishing and organiser is None:
        return Standing.UNCHECKED
    words = {word.owner: word.good for word in eligible_words}
    good = sum(words.values())
    enough = good >= jury.needed(statement.holder) and good >= len(words) - good
    return Standing.BACKED if enough else Standing.UNCHECKED


def eligible(
    statement: CheckpointStatement, attestations: Iterable[Attestation], jury: Jury
) -> list[Attestation]:
    """Those of the attestations whose owners may vouch."""
    witnesses = jury.witnesses(statement.holder)
    return [word for word in attestations if word.owner in witnesses]


def measured_loss(words: Sequence[Attestation], organiser: NodeId) -> float | None:
    """The held-out loss as eligible witnesses measured it: the organiser's, else their median."""
    losses = {word.owner: word.loss for word in words if word.good and word.loss is not None}
    return losses.get(organiser, median(losses.values())) if losses else None


def loss_refusal(stated: float, measured: float, baseline: float | None = None) -> str | None:
    """Why weights stated to have a held-out loss of `stated` are not believed when it measures as `measured`.

    `baseline`: the loss of a network that says nothing (zero everywhere), if known. None: they are believed.
    """
    if not math.isfinite(measured):
        return "their held-out loss is not finite"
    if measured > stated * (1 + LOSS_TOLERANCE) + LOSS_SLACK:
        return f"their held-out loss is {measured:.4f}, not {stated:.4f} as stated"
    if baseline is not None and measured > WORST_OF_BASELINE * baseline:
        return f"their held-out loss is {measured:.4f}, a network that says nothing has {baseline:.4f}"
    return None


def raw_loss_refusal(stated: float, raw: float) -> str | None:
    """Why raw weights with the held-out loss `raw` are not believed to have the average whose loss was stated
    as `stated`. None: they are believed."""
    if not math.isfinite(raw):
        return "the raw weights' held-out loss is not finite"
    if raw > stated * RAW_FACTOR + RAW_SLACK:
        return f"the raw weights' held-out loss is {raw:.4f}, their average's was stated as {stated:.4f}"
    return None


def least_elsewhere(measured: float) -> float:
    """The least loss that another honest machine may have measured where this one measured `measured`."""
    return (measured - LOSS_SLACK) / (1 + LOSS_TOLERANCE)


def holder_lied(stated: float, measured: float, baseline: float) -> bool:
    """Whether who stated the loss of refused weights did so against better knowledge: no honest machine can
    have measured so little. Otherwise rounding decided, and strangers choose what it decides on."""
    return loss_refusal(stated, least_elsewhere(measured), baseline) is not None


def witness_lied(stated: float, said: float, measured: float, baseline: float) -> bool:
    """Whether who found such weights good with a loss of `said` did: `said` is further than twice the
    tolerance from `measured` here, or is itself a reason to refuse them."""
    low, high = sorted((said, measured))
    apart = loss_refusal(low, least_elsewhere(high)) is not None
    return apart or holder_lied(stated, said, baseline)


def fair_order(
    new: Mapping[NodeId, Sequence[bytes]],
    first: Collection[NodeId],
    salt: bytes,
    vouched: Collection[bytes] = (),
) -> list[bytes]:
    """The order in which to verify the `new` signed statements that keys announce, each once.

    Key by key in turns, each turn in an order by hash of `salt`: a key gets no more for announcing more, and
    none knows where it will stand. Of every two places one is for those of the statements in `vouched`, then
    for the keys in `first`, while there are any.
    """

    def turns(keys: Iterable[NodeId]) -> list[bytes]:
        places = [
            (turn, hashlib.sha256(salt + key).digest(), data)
            for key in keys
            for turn, data in enumerate(dict.fromkeys(new[key]))
        ]
        return [data for _, _, data in sorted(places)]

    ours, others = turns(new.keys() & first), turns(new.keys() - first)
    mixed = itertools.zip_longest([*sorted(vouched), *ours], others)
    return list(dict.fromkeys(data for pair in mixed for data in pair if data is not None))


def limit_per_holder(
    statements: Iterable[CheckpointStatement], backed: Collection[CheckpointStatement], limit: int
) -> list[CheckpointStatement]:
    """At most `limit` (two or more) statements of each holder: the newest that somebody counts on (`backed`),
    the newest of all, then the other backed ones and the others, each newest first. One key must not fill a
    reader's table; but copies of its older checkpoints are announced for minutes, and must not hide what it
    made last.
    """
    by_holder: dict[NodeId, list[CheckpointStatement]] = {}
    for statement in statements:
        by_holder.setdefault(statement.holder, []).append(statement)
    kept: list[CheckpointStatement] = []
    for some in by_holder.values():
        some.sort(key=lambda one: (-one.finished, -one.term, -one.step, one.weights.info_hash))
        counted = sorted(some, key=lambda one: one not in backed)
        kept += list(dict.fromkeys([counted[0], some[0], *counted]))[:limit]
    return kept


def refusal(statement: CheckpointStatement, manifest: Manifest, role: Role) -> str | None:
    """Why a statement of the manifest's run cannot be a checkpoint of `role`, or None.

    Nothing need be fetched to know. The sizes are checked so that a liar cannot make a node fetch a disk
    full of noise before it finds out. Whether the statement is of this run is `choose_checkpoint`'s to check.
    """
    if statement.role != role or role not in manifest.roles:
        return "it belongs to another role"
    allowed = manifest.variants(role)
    if statement.variant not in allowed:
        return f"it is of variant {statement.variant}, which the recipe does not allow for {role}"
    if statement.total_steps != manifest.training(role, statement.variant).steps:
        return "it counts another number of total steps than the recipe"
    if not math.isfinite(statement.created_unix):
        return "the time it was made at is not a time"
    if term_number(statement.term) > highest_number(statement.created_unix):
        return "its term is beyond what a claim could carry when it was made"
    if not (math.isfinite(statement.heldout_loss) and statement.heldout_loss >= 0):
        return "its held-out loss is not a loss"
    return _size_refusal(statement, manifest.architecture(role, statement.variant))


def _size_refusal(statement: CheckpointStatement, architecture: Architecture) -> str | None:
    try:
        weights = tensor_bytes(architecture.tensors)
    except RemoteProtocolError as error:
        return f"its architecture cannot be checked: {error}"
    if not weights < statement.weights.length <= weights + MAX_HEADER_BYTES + SIDE_FILES_BYTES:
        return "its weights are smaller or larger than the architecture's tensors can be"
    if statement.resume.length > RESUME_FACTOR * weights + SIDE_FILES_BYTES:
        return "its resume item is larger than any optimizer's state"
    return None


def order_checkpoints(
    candidates: Iterable[CheckpointStatement], manifest: Manifest, role: Role
) -> list[CheckpointStatement]:
    """Those of the run's checkpoints that fit `role`, each once, best first; who fetches tries them in this
    order.

    1. More steps: training done is what a checkpoint is worth, and a successor who went on from an older
       one must not hide a late writer's newer one (a statement of an old term stays a candidate).
    2. The higher term: of equal steps, the lineage that the role's present holder goes on from, so that
       those who fetch and those who train agree.
    3. The lower held-out loss: two holders of one term (a partition) are told apart by quality.
    4. Content id, then holder, then time: arbitrary, but the same for every node that sees the same
       statements.

    Steps and loss are the holder's word. A liar's checkpoint wins here and fails when its bytes are checked
    (`store.weights`); then the next candidate is tried.
    """
    fitting = [one for one in dict.fromkeys(candidates) if refusal(one, manifest, role) is None]
    return sorted(fitting, key=_rank)


def choose_checkpoint(
    candidates: Iterable[CheckpointStatement], run: SignedManifest, role: Role
) -> list[CheckpointStatement]:
    """As `order_checkpoints`, of candidates that may belong to any run: those of other runs are left out."""
    ours = (candidate for candidate in candidates if candidate.run_id == run.run_id)
    return order_checkpoints(ours, run.manifest, role)


def _rank(statement: CheckpointStatement) -> tuple[int, int, float, bytes, bytes, float]:
    return (
        -statement.step,
        -statement.term,
        statement.heldout_loss,
        statement.weights.info_hash,
        statement.holder,
        statement.created_unix,
    )
