"""How fast requests get through is learnt from those being worked on, not from waiting."""

import asyncio
from collections.abc import Callable

import pytest
from starlette.types import Message, Receive, Scope, Send

from service import uploads
from service.measurements import Measurements, measuring
from service.uploads import Admission

pytestmark = pytest.mark.anyio

DEADLINE_S = 60.0


class Clock:
    """Stands in for the module `time` in `service.uploads`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(uploads, "time", made)
    return made


class Requests:
    """POSTs through an `Admission`, each ended when a test says so."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._admission = Admission(self._answer, max_requests=100)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["hold"] is not None:
            await scope["hold"]
        scope["work"]()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def post(
        self,
        work: Callable[[], None] = lambda: None,
        *,
        hold: asyncio.Future[None] | None = None,
        noted: Measurements | None = None,
    ) -> int:
        now = self._clock.now
        noted = noted or Measurements(started=now, body_read=now, deadline_s=DEADLINE_S)
        statuses = list[int]()

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            if "status" in message:
                statuses.append(message["status"])

        scope = {"type": "http", "method": "POST", "work": work, "hold": hold}
        with measuring(noted):
            await self._admission(scope, receive, send)
        return statuses[0]


async def test_a_slow_upload_in_a_quiet_hour_does_not_shut_the_door(clock: Clock) -> None:
    requests = Requests(clock)
    slow = asyncio.get_running_loop().create_future()
    never_read = Measurements(started=clock.now, deadline_s=DEADLINE_S)
    uploading = asyncio.create_task(requests.post(hold=slow, noted=never_read))
    await asyncio.sleep(0)
    for _ in range(20):
        clock.now += 3600.0
        assert await requests.post(lambda: setattr(clock, "now", clock.now + 0.1)) == 200
    slow.set_result(None)
    assert await uploading == 200


async def test_failures_and_clients_that_leave_teach_nothing(clock: Clock) -> None:
    requests = Requests(clock)
    for noted in (
        Measurements(started=clock.now, deadline_s=DEADLINE_S, error_code="invalid_image"),
        Measurements(started=clock.now, deadline_s=DEADLINE_S, client_left=True),
    ):
        for _ in range(50):
            await requests.post(lambda: setattr(clock, "now", clock.now + 3600.0), noted=noted)
    waiting = asyncio.get_running_loop().create_future()
    held = [asyncio.create_task(requests.post(hold=waiting)) for _ in range(10)]
    await asyncio.sleep(0)
    assert await requests.post() == 200
    waiting.set_result(None)
    assert await asyncio.gather(*held) == [200] * 10


async def test_a_pause_of_the_process_does_not_shut_the_door(clock: Clock) -> None:
    requests = Requests(clock)
    for _ in range(100):
        await requests.post(lambda: setattr(clock, "now", clock.now + 0.01))
    await requests.post(lambda: setattr(clock, "now", clock.now + 3600.0))
    waiting = asyncio.get_running_loop().create_future()
    held = [asyncio.create_task(requests.post(hold=waiting)) for _ in range(20)]
    await asyncio.sleep(0)
    assert await requests.post() == 200
    waiting.set_result(None)
    assert await asyncio.gather(*held) == [200] * 20


async def test_who_would_come_too_late_is_refused_and_let_in_again_later(clock: Clock) -> None:
    requests = Requests(clock)
    for _ in range(100):  # one in 5 s
        assert await requests.post(lambda: setattr(clock, "now", clock.now + 5.0)) == 200
    waiting = asyncio.get_running_loop().create_future()
    held = [asyncio.create_task(requests.post(hold=waiting)) for _ in range(9)]
    await asyncio.sleep(0)
    assert await requests.post() == 429  # behind 9 that take 5 s each, of 60 s
    waiting.set_result(None)
    statuses = await asyncio.gather(*held)
    assert statuses.count(200) >= 7
    assert await requests.post() == 200
