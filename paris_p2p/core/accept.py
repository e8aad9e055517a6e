"""Which checkpoints may be used, and which is best: pure rules over signed statements and headers.

Owns: the conditions a checkpoint must meet before a byte of it is fetched (`refusal`), before it is used or
passed on (`check_weights_header`), and the order in which candidates are tried (`order_checkpoints`).
Does not own: fetching, or reading weights (`store.weights`).
"""

import math
from collections.abc import Iterable

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import ROUTER, Role
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.manifest import Architecture, Manifest, SignedManifest
from paris_p2p.wire.safetensors_header import MAX_HEADER_BYTES, Header, check_schema, tensor_bytes

MAX_TERM = (1 << 31) - 1
"""The highest term a claim can carry (`wire.records.ClaimRecord`): no checkpoint comes from beyond it."""
SIDE_FILES_BYTES = 64 << 20
"""Room in an item beside the tensors: headers, `config.json`, random states, data cursor."""
RESUME_FACTOR = 16
"""How many times the weights' bytes a resume item may hold. AdamW needs raw weights, average and two
moments in fp32: 4 times fp32 weights, 8 times bf16 ones; the rest is room for other optimizers."""


def check_weights_header(header: Header, architecture: Architecture) -> None:
    """Refuse weights whose tensors are not exactly the architecture's.

    Raises `RemoteProtocolError` naming the first difference.
    """
    check_schema(header, architecture.tensors)


def refusal(statement: CheckpointStatement, manifest: Manifest, role: Role) -> str | None:
    """Why a statement of the manifest's run cannot be a checkpoint of `role`, or None.

    Nothing need be fetched to know. The sizes are checked so that a liar cannot make a node fetch a disk
    full of noise before it finds out. Whether the statement is of this run is `choose_checkpoint`'s to check.
    """
    if statement.role != role or role not in manifest.roles:
        return "it belongs to another role"
    variants = 1 if role == ROUTER else len(manifest.recipe.experts)
    if statement.variant >= variants:
        return f"it is of variant {statement.variant}, the recipe has {variants}"
    if statement.total_steps != manifest.training(role, statement.variant).steps:
        return "it counts another number of total steps than the recipe"
    if statement.term > MAX_TERM:
        return "its term is beyond what a claim can carry"
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
