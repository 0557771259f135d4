"""From start to end: real processes, real signals, real sockets."""

import asyncio
import io
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.answers import error_of, json_of
from tests.service.pictures import png
from tests.service.processes import Service, running, until


def post(service: Service, seed: int, path: str = "/v1/embeddings", **data: Any) -> httpx.Response:
    files = {"image": ("a.png", io.BytesIO(png(seed)))}
    return httpx.post(f"{service.url}{path}", files=files, data=data, timeout=120)


def busy(service: Service) -> None:
    """Waits until a batch is under way: it was taken from the queue, and is not through."""
    until(lambda: service.metric("dinoscope_queue_wait_seconds_count") or None, service)


def test_probes_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "how.json").write_text('{"load_s": 2, "batch_s": 0.5}')
    with running(tmp_path) as service:
        assert json_of(httpx.get(f"{service.url}/healthz"))["status"] == "ok"
        early = httpx.get(f"{service.url}/readyz")
        assert (early.status_code, early.json()["reasons"]) == (503, ["loading the model"])
        refused = httpx.get(f"{service.url}/v1/models")
        assert "loading the model" in error_of(refused, 503, "starting")["message"]
        assert refused.headers["retry-after"] == "1"
        assert service.metric("dinoscope_ready") == 0
        seen = ["loading the model"]

        def look() -> bool | None:
            answer = httpx.get(f"{service.url}/readyz")
            if answer.status_code == 200:
                return True
            (reason,) = answer.json()["reasons"]
            seen.extend([reason] if reason != seen[-1] else [])
            return None

        until(look, service)
        assert seen[:2] == ["loading the model", "warming up"]
        assert seen[2:] in ([], ["opening collections"])  # that may be too quick to be seen
        assert service.metric("dinoscope_ready") == 1
        json_of(post(service, 1))


@pytest.mark.parametrize("when", ["load_s", "batch_s"])
def test_a_signal_while_it_starts(tmp_path: Path, when: str) -> None:
    (tmp_path / "how.json").write_text(f'{{"{when}": 600}}')
    with running(tmp_path) as service:
        service.logged("loading the model" if when == "load_s" else "warming up")
        service.logged("listening on")
        service.terminate()
        assert service.wait() == 0


def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "how.json").write_text('{"fail": "load"}')
    with running(tmp_path) as service:
        assert service.wait() == 2
        told = service.told("error: model 'x' is damaged")
        assert told["level"] == "critical"


def test_a_folder_that_another_process_has(tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    with running(tmp_path) as first:
        first.ready()
        with running(second, data_dir=tmp_path / "data") as other:
            assert other.wait() == 2
            assert "data" in other.told("error: ")["message"]
        json_of(httpx.get(f"{first.url}/readyz"))


def test_sigterm_under_load(tmp_path: Path) -> None:
    """What was let in is finished, what comes is refused, what was acknowledged is there."""
    with running(tmp_path, max_batch_size=2) as service, ThreadPoolExecutor(8) as pool:
        service.ready().set(batch_s=0.3)
        path = "/v1/collections/default/images"
        uploads = [pool.submit(post, service, i, path, id=f"{i}") for i in range(8)]
        busy(service)
        idle = httpx.Client(base_url=service.url)
        idle.get("/healthz")
        until(
            lambda: service.metric("dinoscope_http_requests_in_progress") >= 9 or None, service
        )  # eight uploads and this look
        port = service.port
        service.terminate()
        service.logged("Shutting down")

        def refused() -> bool | None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            except ConnectionRefusedError:
                return True
            return None

        until(refused, service)
        with pytest.raises(httpx.TransportError):
            idle.get("/healthz")
        answers = [upload.result() for upload in uploads]
        assert [answer.status_code for answer in answers] == [200] * 8
        assert service.wait() == 0
        assert [one["status"] for one in service.requests() if one["method"] == "POST"] == [200] * 8
    with running(tmp_path) as service:
        service.ready()
        for i in range(8):
            assert json_of(httpx.get(f"{service.url}{path}/{i}"))["id"] == f"{i}"


def test_a_drain_that_takes_too_long_answers_503(tmp_path: Path) -> None:
    with running(tmp_path, drain_seconds=1) as service, ThreadPoolExecutor(1) as pool:
        service.ready().set(batch_s=600)
        waiting = pool.submit(post, service, 1)
        busy(service)
        service.terminate()
        error_of(waiting.result(), 503, "shutting_down")
        assert service.wait() == 0
        assert service.told("threads did not end")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with running(tmp_path, drain_seconds=600) as service, ThreadPoolExecutor(1) as pool:
        service.ready().set(batch_s=600)
        waiting = pool.submit(post, service, 1)
        busy(service)
        service.terminate()
        service.logged("Shutting down")
        service.terminate()
        assert service.wait() == 128 + signal.SIGTERM
        assert isinstance(waiting.exception(), httpx.TransportError)


def test_a_dead_thread_of_the_model_ends_the_process(tmp_path: Path) -> None:
    with running(tmp_path, drain_seconds=600) as service, ThreadPoolExecutor(2) as pool:
        service.ready().set(fail="exit", batch_s=0.5)
        for answer in [pool.submit(post, service, seed) for seed in (1, 2)]:
            error_of(answer.result(), 503, "shutting_down")
        assert service.wait() == 1
        assert service.told("the thread of the model 'fake' has ended")["level"] == "critical"


def test_a_dead_decoding_thread_ends_the_process(tmp_path: Path) -> None:
    settings = {"drain_seconds": 600, "decode_threads": 1}
    with running(tmp_path, **settings) as service, ThreadPoolExecutor(1) as pool:
        service.ready().set(fail="kill_decoder")
        json_of(post(service, 1))
        lost = pool.submit(post, service, 2)  # whose picture the dying thread took
        error_of(lost.result(), 503, "shutting_down")
        assert service.wait() == 1
        assert service.told("a thread that decodes pictures has ended")["level"] == "critical"


def test_failures_show_and_recover_by_themselves(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        service.ready().set(fail="error")
        for seed in range(3):
            answer = post(service, seed)
            assert "secret" not in error_of(answer, 503, "model_failed")["message"]
            assert answer.headers["retry-after"] == "1"
        unready = httpx.get(f"{service.url}/readyz")
        assert unready.status_code == 503
        (reason,) = unready.json()["reasons"]
        assert "batches: RuntimeError" in reason
        assert "secret" not in reason
        assert service.metric("dinoscope_ready") == 0
        json_of(httpx.get(f"{service.url}/healthz"))
        service.set()
        service.ready()  # nobody asked for anything: a probe found out
        service.logged("the model 'fake' works again")
        json_of(post(service, 1))


def test_memory_that_runs_out_makes_batches_smaller(tmp_path: Path) -> None:
    with running(tmp_path, max_batch_size=8) as service:
        service.ready().set(fail="memory", fits=3)
        files = [("image", ("a.png", png(seed))) for seed in range(8)]
        json_of(httpx.post(f"{service.url}/v1/embeddings", files=files, timeout=60))
        assert service.metric("dinoscope_batch_limit_pictures", model="fake") == 2
        failures = service.metric("dinoscope_batch_failures_total", reason="out_of_memory")
        assert failures == 3  # 8, 4 and 4
        json_of(httpx.get(f"{service.url}/readyz"))


def test_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    settings = {"max_request_images": 1, "max_queue": 2, "max_requests": 4}
    with running(tmp_path, **settings) as service, ThreadPoolExecutor(4) as pool:
        service.ready().set(batch_s=3)
        first = pool.submit(post, service, 1)
        busy(service)
        sockets = [_send_and_wait(service, png(seed)) for seed in (2, 3)]
        depth = "dinoscope_queue_depth_pictures"
        until(lambda: service.metric(depth) == 2 or None, service)
        error_of(post(service, 4), 429, "queue_full")
        for one in sockets:
            one.close()
        until(lambda: service.metric(depth) == 0 or None, service)
        assert not first.done()  # the places were free before the model was
        left = [one for one in service.requests() if one["status"] == 499]
        assert len(left) == 2
        json_of(post(service, 5))
        json_of(first.result())
        assert service.metric("dinoscope_batch_size_pictures_sum") == 2  # nobody ran in vain


def _send_and_wait(service: Service, content: bytes) -> socket.socket:
    """A request whose answer nobody reads, on a socket of its own."""
    connection = socket.create_connection(("127.0.0.1", service.port))
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def test_a_client_that_leaves_in_the_middle_of_its_body(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        service.ready()
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
                b"Content-Length: 1000\r\n\r\nabc"
            )
            time.sleep(0.1)
        until(lambda: [one for one in service.requests() if one["status"] == 499] or None, service)
        assert not [one for one in service.lines if "traceback" in one]


def test_what_waits_past_the_deadline_leaves(tmp_path: Path) -> None:
    settings = {"deadline_seconds": 1, "max_batch_size": 1}
    with running(tmp_path, **settings) as service, ThreadPoolExecutor(4) as pool:
        service.ready().set(batch_s=4)
        first = pool.submit(post, service, 1)
        busy(service)
        waited = post(service, 2)
        error_of(waited, 429, "queue_timeout")
        assert int(waited.headers["retry-after"]) >= 1
        late = first.result()
        error_of(late, 503, "deadline_exceeded")
        assert late.headers["retry-after"]
        assert service.metric("dinoscope_queue_depth_pictures") == 0
        service.set()
        until(lambda: post(service, 3).status_code == 200 or None, service)


async def _many(url: str) -> list[int]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        answers = await asyncio.gather(*(client.get(f"/v1/nothing/{i}") for i in range(50)))
        return [answer.status_code for answer in answers]


def test_paths_make_no_labels(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        service.ready()
        assert asyncio.run(_many(service.url)) == [404] * 50
        samples = httpx.get(f"{service.url}/metrics").text
        assert "nothing" not in samples
        assert (
            service.metric("dinoscope_http_requests_total", route="(unknown)", status="404") == 50
        )
