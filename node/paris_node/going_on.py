"""In which order a trainer tries the checkpoints of its role.

Owns: which are looked at before the role is trained, and how many are tried. Does not own: their standing
(`judging`), fetching and trying them (`training_job`).
"""

from collections.abc import Sequence

from paris_node.judging import Candidate, going_on_order
from paris_p2p.core.accept import Standing

RESUME_CANDIDATES = 8
"""Credible ones come first; strangers can announce as many others as they like."""
MAX_ENDS_TRIED = 2
"""Unchecked checkpoints of the last step that are looked at first; each costs at most a stall and a check."""


def order_to_try(found: Sequence[Candidate]) -> list[Candidate]:
    """The credible ones first, but a role that somebody calls finished is looked at before it is trained on:
    its trainer's claim lapses, and the check of its last checkpoint may take longer on a busy machine."""
    ends = [one for one in found if one.statement.finished]
    known = any(one.credible for one in ends)
    first = (
        []
        if known
        else going_on_order([one for one in ends if one.standing is Standing.UNCHECKED], MAX_ENDS_TRIED)
    )
    tried = {one.data for one in first}
    return [*first, *(one for one in going_on_order(found, RESUME_CANDIDATES) if one.data not in tried)]
