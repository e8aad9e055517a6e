"""Tests of `paris_p2p.core.accept`."""

import dataclasses
import itertools
import random
from typing import Any

import pytest

from paris_p2p.core.accept import (
    RESUME_FACTOR,
    SIDE_FILES_BYTES,
    Attestation,
    Jury,
    Standing,
    choose_checkpoint,
    fair_order,
    holder_lied,
    limit_per_holder,
    loss_refusal,
    measured_loss,
    order_checkpoints,
    raw_loss_refusal,
    refusal,
    standing,
    witness_lied,
)
from paris_p2p.ids import ROUTER, InfoHash, NodeId, Role, RunId, Term, expert_role
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import (
    Architecture,
    Cluster,
    TensorSpec,
    sign_manifest,
)
from paris_p2p.wire.safetensors_header import MAX_HEADER_BYTES
from paris_p2p.wire.terms import MARK_BITS
from tests.samples import ORGANISER, TRAINING, manifest, recipe, variant

WEIGHT = TensorSpec("w", "F32", (256,))
WEIGHT_BYTES = 1024
NETWORK = Architecture("Net", {}, (WEIGHT,))
SHARD = ContentRef(InfoHash(b"d" * 32), 9, 1 << 14)
VARIANTS = (
    variant(NETWORK, name="flow"),
    variant(NETWORK, dataclasses.replace(TRAINING, steps=200), name="noise", objective="ddpm"),
)
MANIFEST = manifest(
    recipe=recipe(VARIANTS, NETWORK),
    clusters=(Cluster(0, 1, 1, SHARD, SHARD), Cluster(1, 1, 1, SHARD, SHARD)),
)
RUN = sign_manifest(MANIFEST, ORGANISER)
ROLE = expert_role(1)


def item(length: int, letter: bytes = b"w") -> ContentRef:
    return ContentRef(InfoHash(letter * 32), length, 1 << 14)


def statement(**change: Any) -> CheckpointStatement:
    base = CheckpointStatement(
        run_id=RUN.run_id,
        role=ROLE,
        term=Term(1),
        holder=NodeId(b"h" * 32),
        step=50,
        total_steps=100,
        variant=0,
        weights=item(WEIGHT_BYTES + 100),
        resume=item(4 * WEIGHT_BYTES, b"r"),
        parent=b"",
        heldout_loss=0.5,
        created_unix=1.7e9,
    )
    return dataclasses.replace(base, **change)


def test_a_fitting_statement_is_accepted() -> None:
    assert refusal(statement(), MANIFEST, ROLE) is None
    assert refusal(statement(variant=1, total_steps=200), MANIFEST, ROLE) is None
    assert refusal(statement(role=ROUTER), MANIFEST, ROUTER) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"role": expert_role(0)}, "another role"),
        ({"variant": 2}, "variant 2"),
        ({"variant": 1}, "total steps"),
        ({"total_steps": 99}, "total steps"),
        ({"term": Term(1 << MARK_BITS)}, "term"),  # made in the very second that numbers count from
        ({"created_unix": float("inf")}, "not a time"),
        ({"heldout_loss": -0.1}, "loss"),
        ({"heldout_loss": float("nan")}, "loss"),
        ({"weights": item(WEIGHT_BYTES)}, "weights are smaller"),
        ({"weights": item(WEIGHT_BYTES + MAX_HEADER_BYTES + SIDE_FILES_BYTES + 1)}, "or larger"),
        ({"resume": item(RESUME_FACTOR * WEIGHT_BYTES + SIDE_FILES_BYTES + 1)}, "resume item"),
    ],
)  # fmt: skip
def test_a_statement_that_does_not_fit_is_refused_with_the_reason(
    change: dict[str, Any], reason: str
) -> None:
    assert reason in (refusal(statement(**change), MANIFEST, ROLE) or "accepted")
    assert order_checkpoints([statement(**change)], MANIFEST, ROLE) == []


def test_a_role_the_run_does_not_have_is_refused() -> None:
    role = Role("expert-2")
    assert "another role" in (refusal(statement(role=role), MANIFEST, role) or "accepted")


def test_a_variant_that_the_role_may_not_be_is_refused() -> None:
    only_noise = tuple(dataclasses.replace(cluster, variants=(1,)) for cluster in MANIFEST.clusters)
    manifest = dataclasses.replace(MANIFEST, clusters=only_noise)
    assert refusal(statement(variant=1, total_steps=200), manifest, ROLE) is None
    assert "variant 0" in (refusal(statement(), manifest, ROLE) or "accepted")
    assert refusal(statement(role=ROUTER), manifest, ROUTER) is None


def test_a_router_has_no_second_variant() -> None:
    only = statement(role=ROUTER, variant=1, total_steps=statement(role=ROUTER).total_steps)
    assert "of variant 1" in (refusal(only, MANIFEST, ROUTER) or "accepted")


def test_an_architecture_nobody_can_measure_accepts_nothing() -> None:
    odd = Architecture("Net", {}, (TensorSpec("w", "F4", (2,)),))
    recipe = dataclasses.replace(
        MANIFEST.recipe, experts=(dataclasses.replace(VARIANTS[0], architecture=odd),)
    )
    manifest = dataclasses.replace(MANIFEST, recipe=recipe)
    assert "cannot be checked" in (refusal(statement(), manifest, ROLE) or "")


def test_checkpoints_of_other_runs_are_left_out() -> None:
    ours, foreign = statement(), statement(run_id=RunId(bytes(32)))
    assert choose_checkpoint([foreign, ours], RUN, ROLE) == [ours]


RANKED = [
    statement(step=100),
    statement(step=60, term=Term(1)),  # a late writer of an old term, further than the new one
    statement(step=50, term=Term(2), heldout_loss=0.9),
    statement(step=50, term=Term(1), heldout_loss=0.1),
    statement(step=50, term=Term(1), heldout_loss=0.5, weights=item(WEIGHT_BYTES + 100, b"a")),
    statement(step=50, term=Term(1), heldout_loss=0.5, holder=NodeId(b"a" * 32)),
    statement(step=50, term=Term(1), heldout_loss=0.5),
]


def test_more_steps_come_first_then_terms_then_quality_then_ids() -> None:
    for seed in range(20):
        shuffled = random.Random(seed).sample(RANKED, len(RANKED))
        assert order_checkpoints(shuffled, MANIFEST, ROLE) == RANKED


def test_the_order_of_two_does_not_depend_on_the_others() -> None:
    for better, worse in itertools.combinations(RANKED, 2):
        assert order_checkpoints([worse, better], MANIFEST, ROLE) == [better, worse]


def test_a_statement_heard_from_several_peers_counts_once() -> None:
    assert order_checkpoints([statement(), statement()], MANIFEST, ROLE) == [statement()]


HOLDER, PEERS = NodeId(b"h" * 32), [NodeId(bytes([n]) * 32) for n in range(6)]


def jury(*members: NodeId, publishing: bool = False, ignored: tuple[NodeId, ...] = ()) -> Jury:
    return Jury(ORGANISER.node_id, publishing, frozenset(members), frozenset(ignored))


def says(owner: NodeId, good: bool = True, loss: float | None = None) -> Attestation:
    return Attestation(owner, good, loss)


def stands(*words: Attestation, before: Jury, checked: bool = False) -> Standing:
    return standing(statement(holder=HOLDER), words, before, checked=checked)


def test_a_word_is_only_its_signers_until_enough_others_have_checked() -> None:
    crowd = jury(HOLDER, *PEERS)
    assert stands(before=crowd) is Standing.UNCHECKED
    assert stands(says(HOLDER), before=crowd) is Standing.UNCHECKED
    assert stands(says(PEERS[0]), before=crowd) is Standing.UNCHECKED
    assert stands(says(PEERS[0]), says(PEERS[0]), before=crowd) is Standing.UNCHECKED
    assert stands(says(PEERS[0]), says(PEERS[1]), before=crowd) is Standing.BACKED


def test_a_smaller_run_needs_all_the_others_and_a_lone_trainer_nobody() -> None:
    assert stands(says(PEERS[0]), before=jury(HOLDER, PEERS[0])) is Standing.BACKED
    assert stands(before=jury(HOLDER)) is Standing.BACKED
    assert stands(before=jury()) is Standing.UNCHECKED  # a holder that is not even there
    assert stands(before=jury(PEERS[0])) is Standing.UNCHECKED


def test_the_organisers_word_is_enough_and_the_only_one_while_it_publishes() -> None:
    friends = [says(peer) for peer in PEERS]
    there = jury(ORGANISER.node_id, HOLDER, *PEERS, publishing=True)
    assert stands(*friends, before=there) is Standing.UNCHECKED
    organiser = says(ORGANISER.node_id, loss=0.5)
    assert stands(organiser, before=there) is Standing.BACKED
    assert stands(*friends, says(ORGANISER.node_id, good=False), before=there) is Standing.REFUTED
    assert stands(organiser, before=jury(HOLDER)) is Standing.BACKED  # it has left since


def test_an_organiser_that_could_not_measure_is_a_witness_among_others() -> None:
    """Noise has the right form, too."""
    form, there = says(ORGANISER.node_id), jury(ORGANISER.node_id, HOLDER, *PEERS, publishing=True)
    assert stands(form, before=there) is Standing.UNCHECKED
    assert stands(form, says(PEERS[0]), before=there) is Standing.BACKED
    alone = jury(ORGANISER.node_id, HOLDER, publishing=True)
    assert stands(form, before=alone) is Standing.BACKED  # there is nobody else to ask


def test_the_own_check_beats_every_word() -> None:
    words = [says(peer, good=False) for peer in [*PEERS, ORGANISER.node_id]]
    assert stands(*words, before=jury(*PEERS, publishing=True), checked=True) is Standing.CHECKED


def test_strangers_that_are_no_members_and_caught_liars_do_not_count() -> None:
    words = (says(PEERS[0]), says(PEERS[1]))
    assert stands(*words, before=jury(HOLDER, *PEERS[:1], *PEERS[2:])) is Standing.UNCHECKED
    assert stands(*words, before=jury(HOLDER, *PEERS, ignored=(PEERS[0],))) is Standing.UNCHECKED
    assert stands(*words, before=jury(HOLDER, *PEERS, ignored=(HOLDER,))) is Standing.REFUTED
    caught = jury(HOLDER, *PEERS, ignored=(HOLDER,), publishing=True)
    assert (
        stands(says(ORGANISER.node_id, loss=0.5), before=caught) is Standing.BACKED
    )  # it looked at this one


def test_more_must_find_it_good_than_bad() -> None:
    words = [*(says(peer) for peer in PEERS[:2]), *(says(peer, good=False) for peer in PEERS[2:5])]
    assert stands(*words, before=jury(HOLDER, *PEERS)) is Standing.UNCHECKED
    assert stands(*words[:4], before=jury(HOLDER, *PEERS)) is Standing.BACKED


def test_the_organisers_loss_comes_first_then_the_median() -> None:
    words = [says(PEERS[0], loss=0.1), says(PEERS[1], loss=0.5), says(PEERS[2], loss=0.6), says(PEERS[3])]
    assert measured_loss(words, ORGANISER.node_id) == 0.5
    assert measured_loss([*words, says(ORGANISER.node_id, loss=0.7)], ORGANISER.node_id) == 0.7
    assert measured_loss([says(PEERS[0]), says(PEERS[1], good=False, loss=1.0)], ORGANISER.node_id) is None


@pytest.mark.parametrize(
    ("stated", "measured", "baseline", "reason"),
    [
        (0.5, 0.5, None, None),
        (0.5, 0.3, 1.5, None),
        (0.5, 0.54, 1.5, None),
        (0.5, 0.6, 1.5, "as stated"),
        (0.0, 1.2, 1.5, "as stated"),
        (9.0, 3.0, 1.5, "says nothing"),
        (9.0, float("nan"), None, "not finite"),
    ],
)
def test_a_loss_is_believed_when_it_measures_as_stated(
    stated: float, measured: float, baseline: float | None, reason: str | None
) -> None:
    said = loss_refusal(stated, measured, baseline)
    assert said is None if reason is None else reason in (said or "")


@pytest.mark.parametrize(
    ("stated", "said", "measured", "holder", "witness"),
    [
        (0.457143, 0.5, 0.500001, False, False),  # between two honest measurements
        (0.457143, 0.44, 0.51, False, False),
        (0.457143, 0.3, 0.5001, False, True),  # no machine measures so little
        (0.1, 0.9, 0.9, True, True),  # its own figure is a reason to refuse them
        (0.0, 0.0, 0.9, True, True),
        (9.0, 1.801, 1.801, False, False),  # 1.5 times the baseline, nearly
        (9.0, 9.0, 9.0, True, True),
        (0.5, 0.5, float("inf"), True, True),
    ],
)
def test_nobody_lied_where_rounding_decides(
    stated: float, said: float, measured: float, holder: bool, witness: bool
) -> None:
    assert loss_refusal(stated, measured, 1.2) is not None
    assert holder_lied(stated, measured, 1.2) is holder
    assert witness_lied(stated, said, measured, 1.2) is witness


@pytest.mark.parametrize(
    ("raw", "believed"), [(0.02, True), (0.4, True), (0.5, False), (float("nan"), False)]
)
def test_raw_weights_may_be_worse_than_their_average_within_reason(raw: float, believed: bool) -> None:
    assert (raw_loss_refusal(0.01, raw) is None) is believed


def test_one_key_has_only_so_many_checkpoints_and_the_backed_ones_stay() -> None:
    many = [statement(holder=HOLDER, step=step) for step in range(10, 60, 10)]
    other = statement(holder=PEERS[0], step=1)
    kept = limit_per_holder([*many, other], {many[0]}, 2)
    assert set(kept) == {many[0], many[4], other}


def test_a_holders_newest_checkpoint_is_not_hidden_by_older_ones_that_others_count_on() -> None:
    old = [statement(holder=HOLDER, step=step) for step in (10, 20, 30)]
    newest = statement(holder=HOLDER, step=40)
    assert set(limit_per_holder([*old, newest], set(old), 3)) == {*old[1:], newest}
    end = statement(holder=HOLDER, step=100, term=1)
    later = statement(holder=HOLDER, step=20, term=2)
    assert end.finished and set(limit_per_holder([*old, end, later], set(old), 2)) == {old[2], end}


def test_a_key_that_announces_much_has_no_more_turns_than_others_and_no_place_of_its_choice() -> None:
    flood = [bytes([n]) for n in range(50)]
    new = {HOLDER: flood, PEERS[0]: [b"a"], PEERS[1]: [b"b"]}
    orders = {tuple(fair_order(new, (), bytes([salt]))) for salt in range(20)}
    assert all({b"a", b"b"} < set(order[:3]) and set(order) == {*flood, b"a", b"b"} for order in orders)
    assert {order.index(b"a") for order in orders} == {0, 1, 2}


def test_of_every_two_statements_verified_one_is_of_those_heard_first() -> None:
    others = {NodeId(bytes([n]) * 32): [bytes([n])] for n in range(200, 210)}
    order = fair_order(others | {HOLDER: [b"one", b"two", b"one"]}, {HOLDER}, b"salt")
    assert (order[0], order[2], len(order)) == (b"one", b"two", 12)


def test_what_is_vouched_for_is_verified_before_whatever_keys_show() -> None:
    others = {NodeId(bytes([n]) * 32): [bytes([n])] for n in range(200, 210)}
    order = fair_order(others | {HOLDER: [b"one"]}, {HOLDER}, b"salt", [bytes([205])])
    assert (order[0], order[2], len(order)) == (bytes([205]), b"one", 11)


def test_a_statement_that_several_announce_is_verified_once() -> None:
    assert fair_order({HOLDER: [b"it"], PEERS[0]: [b"it"]}, {HOLDER}, b"") == [b"it"]
