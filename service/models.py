"""The models that are served, each with a queue of its own, loaded at the start or when needed."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.decode_pool import DecodePool
from service.encoder import ModelInfo
from service.errors import RequestError
from service.vision import Vision

_log = logging.getLogger("service")


@dataclass(eq=False, kw_only=True)
class Model:
    """One model: what is known of it, and how it is loaded.

    Attributes:
        load: builds the network and its queue; takes seconds.
        vision: what `load` gave; None before.
    """

    info: ModelInfo
    load: Callable[[], Vision]
    vision: Vision | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Models:
    """Looks models up by name and by fingerprint. The first is the default.

    Args:
        pool: the decoding threads that they share.

    Raises:
        ValueError: two models of one name, or one model under two names.
    """

    def __init__(self, models: Sequence[Model], *, pool: DecodePool) -> None:
        self._models = list(models)
        self._pool = pool
        self._closed = False
        names = [one.info.name for one in models]
        fingerprints = [one.info.fingerprint for one in models]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(
                    f"two models are named {name!r}; give one of them another name, as in NAME=PATH"
                )
            first = fingerprints.index(fingerprints[i])
            if first < i:
                raise ValueError(f"models {names[first]!r} and {name!r} are the same weights")

    @property
    def infos(self) -> list[ModelInfo]:
        """What is known of each; the default comes first."""
        return [one.info for one in self._models]

    @property
    def default(self) -> ModelInfo:
        """The model of requests and collections that name none."""
        return self._models[0].info

    @property
    def loaded(self) -> list[Vision]:
        """Those that are in memory."""
        return [one.vision for one in self._models if one.vision is not None]

    def info(self, name: str | None) -> ModelInfo:
        """What is known of a model; of the default without a name.

        Raises:
            RequestError: no model of this name is served.
        """
        return self._find(name).info

    def of_fingerprint(self, fingerprint: str) -> ModelInfo | None:
        """The model that made such vectors, if it is served."""
        return next((each for each in self.infos if each.fingerprint == fingerprint), None)

    def ready(self, name: str | None) -> Vision | None:
        """A model at work, where it is loaded; see `vision`, which may take seconds."""
        return None if self._closed else self._find(name).vision

    def vision(self, name: str | None) -> Vision:
        """A model at work, loaded now where it was not; the default without a name.

        Raises:
            RequestError: no model of this name is served.
        """
        model = self._find(name)
        with model.lock:  # whoever asks meanwhile waits for the same
            if self._closed:
                raise RequestError("the service is stopping", code="shutting_down", status=503)
            if model.vision is None:
                _log.info("loading model %r", model.info.name)
                model.vision = model.load()
            return model.vision

    def close(self) -> None:
        """Finish what waits in each, and take no more; the threads that decode end too."""
        self._closed = True
        for one in self._models:
            with one.lock:
                if one.vision is not None:
                    one.vision.close()
        self._pool.close()

    def _find(self, name: str | None) -> Model:
        if name is None:
            return self._models[0]
        for one in self._models:
            if one.info.name == name:
                return one
        raise RequestError(
            f"model {name!r} is not served here; served are "
            f"{', '.join(repr(info.name) for info in self.infos)}",
            code="model_not_found",
            param="model",
            status=404,
        )
