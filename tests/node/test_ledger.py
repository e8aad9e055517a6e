"""Tests of `paris_node.ledger`."""

import threading
from pathlib import Path
from typing import Any

import pytest

from paris_node.ledger import Ledger
from paris_p2p.errors import StoreError
from paris_p2p.ids import Role, Term
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.identity import Identity

ME = Identity(b"m" * 32)
OTHER = Identity(b"x" * 32)
ROLE = Role("expert-0")
INTERVAL = 30


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "statements"


def test_what_is_added_is_held_and_survives_a_restart(world: Any, store: ContentStore, folder: Path) -> None:
    data, statement = world.checkpoint(ME, ROLE, 50, store=store)
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    ledger.add(data, statement)
    assert data in ledger and ledger.newest(ROLE) == (data, statement)
    assert dict(Ledger(folder, store, within_steps=INTERVAL).held()) == {data: statement}


def test_only_the_two_newest_of_a_role_are_kept(world: Any, store: ContentStore, folder: Path) -> None:
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    made = [world.checkpoint(ME, ROLE, step, store=store) for step in (25, 50, 75)]
    for data, statement in made:
        ledger.add(data, statement)
    assert [statement.step for _, statement in ledger.held()] == [50, 75]
    assert not store.has(made[0][1].weights.info_hash) and not store.has(made[0][1].resume.info_hash)
    assert all(store.has(s.weights.info_hash) and store.has(s.resume.info_hash) for _, s in made[1:])
    assert len(list(folder.glob("*.statement"))) == 2


def test_newest_means_the_higher_term_before_the_later_step(
    world: Any, store: ContentStore, folder: Path
) -> None:
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    for term, step in ((1, 75), (2, 50), (1, 80)):
        ledger.add(*world.checkpoint(ME, ROLE, step, term=term, store=store))
    newest = ledger.newest(ROLE)
    assert newest is not None and (newest[1].term, newest[1].step) == (2, 50)
    assert sorted((s.term, s.step) for _, s in ledger.held()) == [(1, 80), (2, 50)]


def test_strangers_terms_do_not_have_the_training_done_removed(
    world: Any, store: ContentStore, folder: Path
) -> None:
    """A little training in terms that its signer chose, announced and safe, against all of the run's."""
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    honest = [world.checkpoint(ME, ROLE, step, term=3, store=store) for step in (60, 90)]
    for data, statement in honest:
        ledger.add(data, statement)
        ledger.keep_announced(ROLE, data)
        ledger.keep_safe(ROLE, data)
    for step, term in ((1, 1000), (2, 1001), (2, 1002), (61, 1003)):
        data, statement = world.checkpoint(OTHER, ROLE, step, term=term, store=store)
        ledger.add(data, statement)
        ledger.keep_safe(ROLE, data)
        newest = ledger.newest(ROLE)
        assert newest is not None
        ledger.keep_announced(ROLE, newest[0])
        assert honest[1][0] in ledger and store.has(honest[1][1].resume.info_hash)
        assert newest[1].step >= 90 - INTERVAL
    assert ledger.newest(ROLE, (ME.node_id, Term(3))) == honest[1]


def test_roles_are_pruned_apart(world: Any, store: ContentStore, folder: Path) -> None:
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    for step in (25, 50):
        ledger.add(*world.checkpoint(ME, ROLE, step, store=store))
        ledger.add(*world.checkpoint(ME, "router", step, store=store))
    assert len(list(ledger.held())) == 4


def test_an_item_that_a_kept_statement_names_is_never_removed(
    world: Any, store: ContentStore, folder: Path
) -> None:
    """Bit-exact training makes two holders' weights at a step the same item."""
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    first, one = world.checkpoint(ME, ROLE, 50, term=1, store=store, content="the same")
    second, two = world.checkpoint(OTHER, ROLE, 50, term=2, store=store, content="the same")
    assert one.weights == two.weights
    for data, statement in (
        (first, one),
        (second, two),
        world.checkpoint(OTHER, ROLE, 75, term=2, store=store),
    ):
        ledger.add(data, statement)
    assert first not in ledger and second in ledger
    assert store.has(two.weights.info_hash) and store.has(two.resume.info_hash)
    assert second in Ledger(folder, store, within_steps=INTERVAL)  # its file is not the one that was removed


def test_a_strangers_statement_cannot_have_the_runs_items_removed(
    world: Any, store: ContentStore, folder: Path
) -> None:
    shard = world.signed.manifest.clusters[0].train
    store.adopt(world.prepared, shard.info_hash)
    ledger = Ledger(folder, store, within_steps=INTERVAL, keep=[shard.info_hash])
    ledger.add(*world.checkpoint(OTHER, ROLE, 10, store=store, resume=shard))
    for step in (25, 50):
        ledger.add(*world.checkpoint(ME, ROLE, step, store=store))
    assert [statement.step for _, statement in ledger.held()] == [25, 50]
    assert store.has(shard.info_hash)


def test_a_statement_whose_items_are_gone_is_not_held(world: Any, store: ContentStore, folder: Path) -> None:
    data, statement = world.checkpoint(ME, ROLE, 50, store=store)
    Ledger(folder, store, within_steps=INTERVAL).add(data, statement)
    store.remove(statement.resume.info_hash)
    assert data not in Ledger(folder, store, within_steps=INTERVAL)


def test_a_damaged_statement_is_left_alone(
    world: Any, store: ContentStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Ledger(folder, store, within_steps=INTERVAL).add(*world.checkpoint(ME, ROLE, 50, store=store))
    (path,) = folder.glob("*.statement")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert list(Ledger(folder, store, within_steps=INTERVAL).held()) == []
    assert path.exists() and "damaged" in caplog.text


def test_an_old_item_that_cannot_be_removed_now_is_removed_later(
    world: Any, store: ContentStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    made = [world.checkpoint(ME, ROLE, step, store=store) for step in (20, 40, 60, 80)]
    ledger.add(*made[0])
    ledger.add(*made[1])
    with monkeypatch.context() as patch:
        patch.setattr(store, "remove", refuse)
        ledger.add(*made[2])
    assert made[2][0] in ledger and made[0][0] in ledger
    ledger.add(*made[3])
    assert [statement.step for _, statement in ledger.held()] == [60, 80]
    assert not any(store.has(statement.weights.info_hash) for _, statement in made[:2])


def refuse(_info_hash: bytes) -> None:
    raise StoreError("in use")


def test_a_disk_that_refuses_is_a_store_error(world: Any, store: ContentStore, folder: Path) -> None:
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    folder.rmdir()
    folder.write_bytes(b"")
    with pytest.raises(StoreError):
        ledger.add(*world.checkpoint(ME, ROLE, 50, store=store))


@pytest.mark.parametrize("missing", ["weights", "resume"])
def test_a_checkpoint_that_is_not_whole_here_is_not_held(
    world: Any, store: ContentStore, folder: Path, missing: str
) -> None:
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    data, statement = world.checkpoint(ME, ROLE, 50, store=store)
    store.remove(getattr(statement, missing).info_hash)
    with pytest.raises(StoreError, match="no longer here"):
        ledger.add(data, statement)
    assert data not in ledger and not list(folder.iterdir())


def test_threads_may_add_while_others_look(world: Any, store: ContentStore, folder: Path) -> None:
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    roles = [Role("router"), *(Role(f"expert-{n}") for n in range(3))]
    made = {
        role: [  # no two with the same bytes: what one role gives up, another would miss
            world.checkpoint(ME, role, step, store=store, content="x" * (100 * number + step))
            for step in range(10, 90, 10)
        ]
        for number, role in enumerate(roles)
    }
    failures: list[BaseException] = []

    def add(role: Role) -> None:
        try:
            for data, statement in made[role]:
                ledger.add(data, statement)
                ledger.newest(role)
        except BaseException as error:  # noqa: BLE001 - a thread's failure is the test's
            failures.append(error)

    threads = [threading.Thread(target=add, args=(role,)) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted((s.role, s.step) for _, s in ledger.held()) == sorted(
        (r, n) for r in roles for n in (70, 80)
    )


def test_the_safe_and_the_announced_checkpoint_stay_beside_the_newest(
    world: Any, store: ContentStore, folder: Path
) -> None:
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    made = {step: world.checkpoint(ME, ROLE, step, store=store) for step in (10, 20, 30, 40, 50)}
    for step in (10, 20):
        ledger.add(*made[step])
    ledger.keep_safe(ROLE, made[10][0])
    ledger.keep_announced(ROLE, made[20][0])
    for step in (30, 40):
        ledger.add(*made[step])
        ledger.keep_safe(ROLE, None)  # not known at the moment: the one that was stays
    assert sorted(statement.step for _, statement in ledger.held()) == [10, 20, 40]
    ledger.keep_safe(ROLE, made[20][0])
    ledger.keep_announced(ROLE, made[40][0])
    ledger.add(*made[50])
    assert sorted(statement.step for _, statement in ledger.held()) == [20, 40, 50]


def test_a_holders_pass_is_kept_with_its_statement(world: Any, store: ContentStore, folder: Path) -> None:
    data, statement = world.checkpoint(OTHER, ROLE, 50, store=store)
    Ledger(folder, store, within_steps=INTERVAL).add(data, statement, b"pass")
    ledger = Ledger(folder, store, within_steps=INTERVAL)
    assert ledger.access(data) == b"pass" and ledger.access(b"other") == b""
    for step in (60, 70):
        ledger.add(*world.checkpoint(OTHER, ROLE, step, store=store))
    assert list(folder.glob("*.pass")) == [] and ledger.access(data) == b""
