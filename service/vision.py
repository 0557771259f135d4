"""Pictures in, vectors and maps out: decoding in threads, the model behind its batcher."""

import asyncio
import hashlib
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from backbone.pictures import Mode, over_white
from service import heatmaps, images
from service.batcher import Batcher
from service.encoder import Array, Encoder, ModelInfo, Task, batch_kind, runner

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncodedPicture:
    """A picture as it came.

    Attributes:
        content: undecoded; or text, a data URI or base64.
        param: its place in the request.
    """

    content: bytes | str
    param: str

    def read(self, limits: images.Limits) -> bytes:
        """The content as bytes; raises `ImageError` for text that is no picture's."""
        if isinstance(self.content, bytes):
            return self.content
        return images.from_text(self.content, limits, param=self.param)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A picture that was decoded: its inputs to the model, and what is kept of it."""

    inputs: dict[Task, Array]
    content_hash: str
    thumbnail: bytes | None


class Vision:
    """Joins the decoding threads and the model's thread behind asynchronous calls.

    Args:
        decode_threads: pictures decoded side by side (Pillow lets go of the interpreter's lock).
        max_batch, max_waiting: of the model's queue; see `Batcher`.
    """

    def __init__(
        self,
        encoder: Encoder,
        limits: images.Limits,
        *,
        decode_threads: int,
        max_batch: int,
        max_waiting: int,
    ) -> None:
        self._encoder = encoder
        self.limits = limits
        self._pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._batcher = Batcher[Array, Array](
            runner(encoder), max_batch=max_batch, max_waiting=max_waiting
        )

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""
        return self._encoder.info

    @property
    def alive(self) -> bool:
        """Whether the model's thread takes work."""
        return self._batcher.alive

    async def encode(self, task: Task, pictures: Sequence[EncodedPicture]) -> list[Array]:
        """The result of `task` for each picture, in order.

        Raises:
            ImageError: the first picture that cannot be taken.
            QueueFull, BatchFailed, BatcherClosed: see `Batcher.submit`.
        """
        work = (self.prepare(p, (task,)) for p in pictures)
        prepared: list[Prepared] = []
        for result in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
            prepared.append(result)
        return await self.run(task, [p.inputs[task] for p in prepared])

    def similarity(self, cls: Array) -> Array:
        """CLS embeddings [n, D] -> the vectors that collections hold; see `Encoder`."""
        return self._encoder.similarity(cls)

    async def attention(
        self, picture: EncodedPicture, *, largest: int
    ) -> tuple[Array, Image.Image]:
        """The maps [heads, h, w] of CLS's attention in the last block, and the picture itself.

        The picture is scaled down to `largest` pixels on its long side before it waits for the
        model, so that a full queue does not hold photographs at full size.
        """

        def work() -> tuple[Array, Image.Image]:
            decoded = self._decode(picture.read(self.limits), picture.param)
            prepared = self._encoder.prepare("attention", decoded)
            decoded = over_white(decoded)
            decoded.thumbnail((largest, largest), Image.Resampling.BICUBIC)
            return prepared, decoded

        loop = asyncio.get_running_loop()
        prepared, decoded = await loop.run_in_executor(self._pool, work)
        return (await self.run("attention", [prepared]))[0], decoded

    async def prepare(
        self, picture: EncodedPicture, tasks: Sequence[Task], *, keep_thumbnail: bool = False
    ) -> Prepared:
        """Decodes a picture once, in a decoding thread, for several tasks.

        Raises:
            ImageError: a picture that cannot be taken.
        """

        def work() -> Prepared:
            content = picture.read(self.limits)
            decoded = self._decode(content, picture.param)
            return Prepared(
                inputs={task: self._encoder.prepare(task, decoded) for task in tasks},
                content_hash=hashlib.sha256(content).hexdigest(),
                thumbnail=images.thumbnail(decoded) if keep_thumbnail else None,
            )

        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def run(self, task: Task, inputs: Sequence[Array]) -> list[Array]:
        """Runs prepared inputs; those of one shape share forward passes with other requests'."""
        kinds: dict[object, list[int]] = {}
        for i, prepared in enumerate(inputs):
            kinds.setdefault(batch_kind(task, prepared), []).append(i)
        results: list[Array] = [inputs[0]] * len(inputs) if inputs else []
        parts = await all_or_none(
            self._batcher.submit(kind, [inputs[i] for i in at]) for kind, at in kinds.items()
        )
        for at, part in zip(kinds.values(), parts, strict=True):
            for i, result in zip(at, part, strict=True):
                results[i] = result
        return results

    def render(
        self, maps: Array, picture: Image.Image, style: heatmaps.Style
    ) -> asyncio.Future[bytes]:
        """Draws maps in a decoding thread."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, heatmaps.draw, maps, picture, style)

    def warm_up(self) -> None:
        """Runs each task once, so that the first request finds everything loaded."""
        grey = Image.new("RGB", (64, 48), (128, 128, 128))
        for task in self.info.tasks:
            self._encoder.run(task, [self._encoder.prepare(task, grey)])

    def _decode(self, content: bytes, param: str) -> Image.Image:
        # In colour for a model of grey too: thumbnails and maps show the picture as it is.
        mode: Mode = "RGBA" if self.info.picture_mode == "RGBA" else "RGB"
        return images.decode(content, self.limits, param=param, mode=mode)

    def close(self) -> None:
        """Finishes what waits, then ends the threads."""
        self._batcher.close()
        self._pool.shutdown()


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order; where one fails, the others are cancelled and it is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
