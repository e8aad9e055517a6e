"""What the organiser of a run is told while it is published.

Owns: which checkpoints are news, and their words. Does not own: reading the run (`run_node`), the screen.
"""

from collections.abc import Sequence

from paris_node.judging import Candidate
from paris_node.snapshot import Observation
from paris_node.text import counted
from paris_p2p.ids import Role
from paris_p2p.programs import Output

SHARE_OF_NEWS = 0.25
"""A role's checkpoints are told of when so much of its steps has come since the last one told."""


class News:
    """Tells of the checkpoints of a run as they come. `fetch_model`: the command that gets the model."""

    def __init__(self, output: Output, roles: Sequence[Role], fetch_model: str) -> None:
        self._output = output
        self._roles = roles
        self._fetch_model = fetch_model
        self._told: dict[Role, int] = {}  # steps
        self._finished: set[Role] = set()
        self._complete = False

    def see(self, observation: Observation) -> None:
        """Say what is new in `observation`."""
        for role in self._roles:
            newest = observation.newest.get(role)
            if newest is not None:
                self._see_role(role, newest, observation.finished([role]))
        if not self._complete and len(self._finished) == len(self._roles):
            self._complete = True
            text = f"every role is finished; get the model with: {self._fetch_model}"
            self._output.event("complete", text, fetch_model=self._fetch_model)

    def _see_role(self, role: Role, newest: Candidate, finished: bool) -> None:
        statement = newest.statement
        loss = statement.heldout_loss if newest.measured is None else newest.measured
        told = {
            "role": role,
            "step": statement.step,
            "total_steps": statement.total_steps,
            "heldout_loss": loss,
            "copies": len(newest.providers),
        }
        rest = f"(held-out loss {loss:.3f}), {counted(len(newest.providers), 'copy', 'copies')}"
        if finished and role not in self._finished:
            self._finished.add(role)
            self._output.event("role_finished", f"{role} is finished, checked {rest}", **told)
            return
        share = (statement.step - self._told.get(role, 0)) / max(1, statement.total_steps)
        if not statement.finished and (role not in self._told or share >= SHARE_OF_NEWS):
            self._told[role] = statement.step
            text = f"{role}: checkpoint at step {statement.step} of {statement.total_steps} {rest}"
            self._output.event("role_checkpoint", text, **told)
