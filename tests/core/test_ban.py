"""Bans decay, and do not shut out the last holder."""

from paris_p2p.core.ban import FIRST_BAN_S, FORGIVE_S, LAST_HOLDER_S, MAX_BAN_S, MAX_BANS, BanList


def test_a_ban_ends() -> None:
    bans: BanList[str] = BanList()
    ban = bans.strike("liar", "bad piece", 100.0)
    assert bans.banned("liar", 100.0) and not bans.banned("honest", 100.0)
    assert not bans.banned("liar", ban.until)


def test_each_offence_bans_longer_up_to_a_limit() -> None:
    bans: BanList[str] = BanList()
    lengths = [(ban := bans.strike("liar", "", 0.0)).until - ban.since for _ in range(6)]
    assert lengths == sorted(lengths) and lengths[0] == FIRST_BAN_S and lengths[-1] == MAX_BAN_S


def test_the_last_holder_is_tried_again_soon() -> None:
    bans: BanList[str] = BanList()
    bans.strike("liar", "", 0.0)
    assert bans.banned("liar", LAST_HOLDER_S, last_holder=False)
    assert not bans.banned("liar", LAST_HOLDER_S, last_holder=True)


def test_an_old_offence_is_forgotten() -> None:
    bans: BanList[str] = BanList()
    bans.strike("liar", "", 0.0)
    again = FIRST_BAN_S + FORGIVE_S
    assert bans.strike("liar", "", again).until == again + FIRST_BAN_S


def test_a_crowd_of_liars_pushes_out_the_one_struck_longest_ago() -> None:
    bans: BanList[int] = BanList()
    for liar in range(MAX_BANS):
        bans.strike(liar, "", 0.0)
    again = bans.strike(0, "", 1.0)
    bans.strike(MAX_BANS, "", 1.0)
    assert again.strikes == 2 and bans.banned(0, 2.0) and bans.banned(MAX_BANS, 2.0)
    assert not bans.banned(1, 2.0) and bans.banned(2, 2.0)


def test_a_crowd_of_liars_is_looked_through_only_every_few_seconds() -> None:
    bans: BanList[int] = BanList()
    bans.strike(0, "", 0.0)
    tables = set()
    for liar in range(1, 100):
        bans.strike(liar, "", liar * 0.01)
        tables.add(id(bans._bans))
    assert len(tables) == 1
    bans.strike(100, "", FIRST_BAN_S + FORGIVE_S + 0.005)
    assert 0 not in bans._bans and 1 in bans._bans
