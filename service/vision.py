"""Pictures in, vectors and maps out: decoding in threads, the model behind its batcher."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from PIL import Image

from service import images, measurements
from service.batcher import Batcher
from service.computing import Computation, Then
from service.decode_pool import DecodePool
from service.encoded import QUICKLY_HASHED, EncodedPicture, ReadPicture
from service.encoder import Array, Encoder, ModelInfo, Task
from service.fetching import Fetcher
from service.jobs import QueueFull
from service.memory import is_out_of_memory
from service.metrics import Metrics
from service.model_batches import batch_kind, enough_for, runner
from service.prepared import Prepared, Wanted, prepare
from service.sharing import Flights, InTask, ResultCache, Work, shared
from service.together import all_or_none, first_error_of

T = TypeVar("T")


class Vision:
    """Joins the decoding threads and the model's threads behind asynchronous calls.

    Equal pictures (by the SHA-256 of their content) that are under way are computed once, and
    results are kept in the cache.

    Args:
        pool, cache, fetcher: may be shared with other models; whoever made them closes them.
            Without a fetcher pictures that come as URLs are refused.
        max_batch, max_waiting, max_waiting_bytes: of the model's queue; see `Batcher`.
        metrics: where what happens is counted.
    """

    def __init__(
        self,
        encoder: Encoder,
        limits: images.Limits,
        *,
        pool: DecodePool,
        cache: ResultCache,
        max_batch: int,
        max_waiting: int,
        max_waiting_bytes: int,
        metrics: Metrics,
        fetcher: Fetcher | None = None,
    ) -> None:
        self._encoder = encoder
        self.limits = limits
        self._pool = pool
        self.cache = cache
        self._max_batch = max_batch
        self._fetcher = fetcher
        self.batcher = Batcher[Array, Array](
            runner(encoder),
            max_batch=max_batch,
            max_waiting=max_waiting,
            max_waiting_bytes=max_waiting_bytes,
            threads=encoder.batches_at_once,
            enough=enough_for(encoder),
            size_of=lambda prepared: prepared.nbytes,
            is_out_of_memory=is_out_of_memory,
            observer=metrics.of_model(encoder.info.name),
        )
        self._preparing = Flights[Hashable, Prepared]()
        self._running = Flights[Hashable, Array]()

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""
        return self._encoder.info

    @property
    def dead(self) -> str | None:
        """Which thread has ended before its time; None where all live."""
        if not self.batcher.alive:
            return f"the thread of the model {self.info.name!r} has ended"
        return None if self._pool.alive else "a thread that decodes pictures has ended"

    @property
    def joined(self) -> int:
        """Results that were taken from a computation under way for another, since the start."""
        return self._running.joined

    async def encode(self, task: Task, pictures: Sequence[EncodedPicture]) -> list[Array]:
        """The result of `task` for each picture, in order; not to be written to.

        Raises:
            ImageError: the first picture that cannot be taken.
            QueueFull, BatchFailed, BatcherClosed, WaitedTooLong, DeadlineExceeded: see
                `DecodePool.run` and `Batcher.submit`.
        """
        if len(pictures) == 1:
            return [await self._encode_one(task, pictures[0])]
        found = await first_error_of(
            [self._kept_or_prepared(task, picture) for picture in pictures]
        )
        prepared = [one for one in found if isinstance(one, Prepared)]
        computed = iter(await self._run(task, prepared) if prepared else [])
        return [next(computed) if isinstance(one, Prepared) else one for one in found]

    def similarity(self, cls: Array) -> Array:
        """CLS embeddings [n, D] -> the vectors that collections hold; see `Encoder`."""
        return self._encoder.similarity(cls)

    async def attention(
        self,
        picture: EncodedPicture,
        task: Task,
        draw: Callable[[Array, Image.Image], T],
        *,
        largest: int,
    ) -> T:
        """What `draw` makes, in a thread, of the result of `task` and of the whole picture.

        The picture is scaled down to `largest` pixels on its long side before it waits for the
        model, so that a full queue does not hold photographs at full size. From the model it goes
        straight to where it is drawn.

        Raises:
            Exception: see `encode`, and what `draw` raised.
        """
        read, kept = await self._kept(task, picture)
        key, first = self._key(task, read.content_hash), [read]
        del read  # see `_encode_one`
        backgrounds: list[Image.Image] = []
        drawings: list[Future[T]] = []
        is_wanted = True

        def then(result: Array, prepared: Prepared) -> None:
            backgrounds.append(_background(prepared))
            if is_wanted:
                work = partial(draw, result, backgrounds[0])
                with suppress(QueueFull):  # asked again below, and told
                    drawings.append(self._pool.start(work, lend=self.batcher.lend))
            if not is_wanted:  # by now
                cancel()

        def cancel() -> None:
            for one in drawings:
                one.cancel()

        def compute() -> Work[Array]:
            wanted = Wanted((task,), background_side=largest)
            return self._compute(wanted, first.pop(), then)

        try:
            if kept is None:
                kept = await self._shared(key, compute, picture.param)
            if drawings:
                return await self._pool.wait_for(drawings[0])
            if not backgrounds:  # the result was kept, or is another request's
                wanted = Wanted((), sized_for=(task,), background_side=largest)
                backgrounds.append(_background(await self._prepare(first.pop(), wanted)))
            return await self._pool.run(partial(draw, kept, backgrounds[0]))
        finally:
            is_wanted = False
            cancel()

    async def prepare(
        self,
        picture: EncodedPicture,
        tasks: Sequence[Task],
        *,
        keep_thumbnail: bool = False,
        background_side: int | None = None,
    ) -> Prepared:
        """Decodes a picture once, in a decoding thread, for several tasks.

        Args:
            background_side: long side in pixels, at most, of `Prepared.background`.

        Raises:
            ImageError: a picture that cannot be taken.
            QueueFull: see `DecodePool.run`.
        """
        wanted = Wanted(tuple(tasks), thumbnail=keep_thumbnail, background_side=background_side)
        return await self._prepare(await self._read(picture), wanted)

    async def run(self, task: Task, prepared: Sequence[Prepared]) -> list[Array]:
        """The results of pictures prepared for `task`, in order; not to be written to.

        What is not kept is computed: inputs of one shape share forward passes with other requests'.
        """
        for one in prepared:
            self.cache.get(self._key(task, one.content_hash))
        return await self._run(task, prepared)

    def both(self, one: Callable[[], T], other: Callable[[], T]) -> tuple[T, T]:
        """Two parts of what `draw` is doing, for `attention`; see `DecodePool.both`."""
        return self._pool.both(one, other)

    def warm_up(self) -> None:
        """Runs each task, so that the first request finds everything loaded."""
        for task in self.info.tasks:
            prepared = self._encoder.prepare(task, _grey())
            self._encoder.warm_up(task, prepared, most=self._max_batch)

    async def probe(self) -> None:
        """Sends a grey picture through the model, as a request would; raises what it would."""
        await self._submit("cls", [self._encoder.prepare("cls", _grey())])

    def close(self) -> None:
        """Finishes what waits for the model, then ends its threads."""
        self.batcher.close()

    async def _kept_or_prepared(self, task: Task, picture: EncodedPicture) -> Array | Prepared:
        read, kept = await self._kept(task, picture)
        return kept if kept is not None else await self._prepare(read, Wanted((task,)))

    async def _kept(self, task: Task, picture: EncodedPicture) -> tuple[ReadPicture, Array | None]:
        read = await self._read(picture)
        measurements.current().model = self.info.name
        return read, self.cache.get(self._key(task, read.content_hash))

    async def _encode_one(self, task: Task, picture: EncodedPicture) -> Array:
        """As `encode`; the picture goes from its decoding thread straight to the model."""
        read, kept = await self._kept(task, picture)
        if kept is not None:
            return kept
        key, first = self._key(task, read.content_hash), [read]
        del read  # its bytes are counted while it is decoded, and are not held for longer

        return await self._shared(
            key, lambda: self._compute(Wanted((task,)), first.pop()), picture.param
        )

    def _compute(self, wanted: Wanted, read: ReadPicture, then: Then | None = None) -> Work[Array]:
        """Begins with the one task that is wanted."""
        return Computation(
            partial(self._decoded, read, wanted),
            wanted.tasks[0],
            pool=self._pool,
            batcher=self.batcher,
            held_bytes=len(read.content),
            then=then,
        )

    async def _shared(
        self, key: Hashable, start: Callable[[], Work[Array]], param: str = ""
    ) -> Array:
        result = await shared(self._running, key, start, param)
        self.cache.put(key, result)
        return result

    async def _read(self, picture: EncodedPicture) -> ReadPicture:
        text = picture.content
        if self._fetcher is None or not isinstance(text, str) or not images.is_url(text):
            return await self._read_present(picture)
        async with self._fetcher.fetched(text, param=picture.param) as content:
            return await self._read_present(replace(picture, content=content))

    async def _read_present(self, picture: EncodedPicture) -> ReadPicture:
        if len(picture.content) <= QUICKLY_HASHED:
            return picture.read(self.limits)
        return await self._pool.run(
            lambda: picture.read(self.limits), held_bytes=len(picture.content)
        )

    async def _prepare(self, read: ReadPicture, wanted: Wanted) -> Prepared:
        key = read.content_hash, wanted
        return await shared(
            self._preparing, key, lambda: InTask(self._decode(read, wanted)), read.param
        )

    async def _decode(self, read: ReadPicture, wanted: Wanted) -> list[Prepared]:
        work, held_bytes = partial(self._decoded, read, wanted), len(read.content)
        return [await self._pool.run(work, held_bytes=held_bytes)]

    def _decoded(self, read: ReadPicture, wanted: Wanted) -> Prepared:
        return prepare(read, wanted, encoder=self._encoder, limits=self.limits)

    async def _run(self, task: Task, prepared: Sequence[Prepared]) -> list[Array]:
        measurements.current().model = self.info.name
        keys = [self._key(task, one.content_hash) for one in prepared]
        kept = [self.cache.peek(key) for key in keys]
        missing = [i for i, result in enumerate(kept) if result is None]
        if not missing:
            return [result for result in kept if result is not None]
        if len(prepared) == 1:
            (one,) = prepared
            inputs = [one.inputs[task]]
            return [await self._shared(keys[0], lambda: InTask(self._submit(task, inputs)))]

        async def work(chosen: Sequence[int]) -> list[Array]:
            results = await self._submit(task, [prepared[missing[i]].inputs[task] for i in chosen])
            for i, result in zip(chosen, results, strict=True):
                self.cache.put(keys[missing[i]], result)
            return results

        computed = iter(
            await self._running.share([keys[i] for i in missing], lambda new: InTask(work(new)))
        )
        return [next(computed) if result is None else result for result in kept]

    async def _submit(self, task: Task, inputs: Sequence[Array]) -> list[Array]:
        request = measurements.current()
        kinds: dict[object, list[int]] = {}
        for i, prepared in enumerate(inputs):
            kinds.setdefault(batch_kind(task, prepared), []).append(i)
        if len(kinds) == 1:
            return await self.batcher.submit(next(iter(kinds)), inputs, deadline=request.deadline)
        results: list[Array] = [inputs[0]] * len(inputs)
        parts = await all_or_none(
            self.batcher.submit(kind, [inputs[i] for i in at], deadline=request.deadline)
            for kind, at in kinds.items()
        )
        for at, part in zip(kinds.values(), parts, strict=True):
            for i, result in zip(at, part, strict=True):
                results[i] = result
        return results

    def _key(self, task: Task, content_hash: str) -> Hashable:
        return self.info.fingerprint, task, content_hash


def _background(prepared: Prepared) -> Image.Image:
    assert prepared.background is not None  # it was wanted
    return prepared.background


def _grey() -> Image.Image:
    return Image.new("RGB", (64, 48), (128, 128, 128))
