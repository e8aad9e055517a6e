"""What a chaos run showed, reckoned from a few made-up events."""

from benchmarks.chaos_story import Event, Kill, Story, figures, losses, stints


def told(*lines: tuple[float, str, int, str, int]) -> list[Event]:
    """Events of one role from (time, node, life, kind, step)."""
    return [
        Event(at, node, life, {"event": kind, "role": "router", "term": 1, "step": step})
        for at, node, life, kind, step in lines
    ]


TAKEN_OVER = told(
    (0.0, "a", 1, "claimed", 0),
    (1.0, "a", 1, "step", 5),
    (9.0, "a", 1, "step", 90),
    (60.0, "b", 1, "claimed", 0),
    (61.0, "b", 1, "resumed", 60),
    (62.0, "b", 1, "step", 61),
    (90.0, "b", 1, "step", 150),
    (91.0, "b", 1, "finished", 0),
)


def story(events: list[Event], kills: list[Kill], safe: list[tuple[float, int]]) -> Story:
    made = Story(events, kills, roles=("router",), exit_codes={"a": 0, "b": 0}, complete=True)
    made.safe["router"] = safe
    return made


def judged(made: Story) -> set[str]:
    bars = figures(made, nodes=2, kills=1, lease_s=30.0)["bars"]
    return {name for name, bar in bars.items() if not bar["met"]}


def test_a_take_over_from_the_safe_step_loses_less_than_one_interval() -> None:
    kill = Kill(10.0, "node", "a", 1, "router", 60)
    made = story(TAKEN_OVER, [kill], [(3.0, 30), (6.0, 60)])
    (loss,) = losses(made, stints(made.events))
    assert (loss.steps, loss.beyond_safe, loss.kill) == (30, 0, kill)
    assert judged(made) == set()
    each = figures(made, nodes=2, kills=1, lease_s=30.0)["each"]
    assert each[0]["next"] == "b" and each[0]["next_s"] == 50.0 and each[0]["lost"] == 30


def test_going_back_behind_the_safe_step_is_seen() -> None:
    made = story(TAKEN_OVER, [Kill(10.0, "node", "a", 1, "router", 80)], [(3.0, 80)])
    assert judged(made) == {"lost_safe_steps"}


def test_the_kill_that_ends_a_training_explains_its_loss_rather_than_a_later_one() -> None:
    kills = [Kill(10.0, "trainer", "a", 1, "router", 60), Kill(20.0, "p2pd", "a", 1, "router", 60)]
    made = story(TAKEN_OVER, kills, [(6.0, 60)])
    assert [loss.kill for loss in losses(made, stints(made.events))] == kills[:1]


def test_a_trainer_that_runs_on_while_its_node_claims_the_role_again_loses_nothing() -> None:
    again = told(
        (0.0, "a", 1, "claimed", 0),
        (9.0, "a", 1, "step", 90),
        (20.0, "a", 1, "claimed", 0),
        (21.0, "a", 1, "step", 95),
        (30.0, "a", 1, "resumed", 96),
        (31.0, "a", 1, "step", 97),
    )
    assert losses(story(again, [], [(6.0, 60)]), stints(again)) == []
    afresh = [*again[:3], *told((31.0, "a", 1, "step", 2))]
    (loss,) = losses(story(afresh, [], [(6.0, 60)]), stints(afresh))
    assert (loss.steps, loss.beyond_safe) == (90, 60)


def test_two_nodes_that_train_one_role_for_longer_than_a_lease_are_seen() -> None:
    late = [*TAKEN_OVER, *told((95.0, "a", 1, "step", 400))]
    assert "overlap_s" not in judged(story(late, [Kill(1.0, "p2pd", "a", 1, None, 0)], [(3.0, 300)]))
    longer = [
        *late,
        *told((99.0, "b", 2, "claimed", 0), (100.0, "b", 2, "step", 1), (150.0, "b", 2, "step", 9)),
    ]
    longer += told((160.0, "a", 1, "step", 500))
    assert "overlap_s" in judged(story(longer, [Kill(1.0, "p2pd", "a", 1, None, 0)], [(3.0, 300)]))


def test_what_is_missing_or_left_is_a_missed_bar() -> None:
    made = story(TAKEN_OVER[:-1], [], [(3.0, 60)])
    made.exit_codes["b"] = 1
    made.orphans.append("p2pd")
    missed = {"kills", "kinds_of_victim", "roles_finished", "volunteers_ended_with_0", "left_behind"}
    assert judged(made) == missed
