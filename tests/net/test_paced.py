"""Work that is asked for often is done at once, then seldom, and never forgotten."""

import trio
from trio.testing import MockClock

from paris_p2p.net.paced import Paced


async def test_the_first_call_is_served_at_once_and_a_flood_of_others_together(
    autojump_clock: MockClock,
) -> None:
    done: list[float] = []
    start = trio.current_time()
    paced = Paced(lambda: done.append(trio.current_time() - start), 0.1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(paced.run)
        for _ in range(100):  # 0.25 s in all
            paced()
            await trio.sleep(0.0025)
        await trio.sleep(5.0)
        paced()
        nursery.cancel_scope.cancel()
    assert [round(at, 3) for at in done] == [0.0, 0.1, 0.2, 0.3, 5.25]


async def test_a_job_that_asks_again_is_done_again_later(autojump_clock: MockClock) -> None:
    done: list[float] = []

    def job() -> None:
        done.append(trio.current_time())
        if len(done) < 3:
            paced()

    paced = Paced(job, 0.1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(paced.run)
        paced()
        assert len(done) == 1
        await trio.sleep(1.0)
        nursery.cancel_scope.cancel()
    assert [round(at - done[0], 3) for at in done] == [0.0, 0.1, 0.2]
