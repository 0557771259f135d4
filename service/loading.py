"""From settings to the models that they name."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from backbone.pretrained import NamedModel, check_name, load_model
from service import cores
from service.addresses import parse_allowances
from service.decode_pool import DecodePool
from service.encoder import Encoder, ModelInfo, TorchEncoder, check_device, model_info
from service.fetching import Fetcher
from service.helper import Helper
from service.images import Limits
from service.metrics import Metrics
from service.models import Model, Models
from service.settings import Settings
from service.sharing import ResultCache
from service.vision import Vision

# At least, for large pictures not to keep small ones waiting; at most, each may hold one whole.
_DECODE_THREADS = 4, 16


def check_settings(settings: Settings) -> None:
    """What can be known at once of models that are loaded later.

    Raises:
        ArtifactError: there is no such model.
        ValueError: the device is not there.
    """
    for given in (settings.model, *settings.models):
        check_name(_name_and_model(given)[1])
    check_device(settings.device)


def find_models(settings: Settings, metrics: Metrics) -> Models:
    """The models that the settings name: each file is looked into, and no network is built yet.

    Raises:
        ArtifactError: there is no such model, or its file cannot be used.
        ValueError: the device is not there, or two models have one name.
    """
    check_device(settings.device)
    torch.set_num_threads(settings.torch_threads or min(torch.get_num_threads(), cores.available()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of all but a model's: see `Batcher`
    shared = share(settings, metrics)
    found = []
    for given in (settings.model, *settings.models):
        find = partial(_named, given)

        def build(find: Callable[[], NamedModel] = find) -> Encoder:
            return TorchEncoder(
                find(),
                device=settings.device,
                max_resolution=settings.max_resolution,
                precision=settings.precision,
                threads=threads,
            )

        info = model_info(find(), settings.precision, max_resolution=settings.max_resolution)
        found.append(make_model(info, build, settings, shared))
    return Models(found, pool=shared.pool)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all models use: decoding threads, kept results, metrics, and what fetches URLs."""

    pool: DecodePool
    cache: ResultCache
    metrics: Metrics
    fetcher: Fetcher | None


def share(settings: Settings, metrics: Metrics) -> Shared:
    """The parts that models share, as the settings want them."""
    least, most = _DECODE_THREADS
    return Shared(
        pool=DecodePool(
            settings.decode_threads or min(max(least, cores.available()), most),
            max_pictures=settings.max_decode_queue,
            max_bytes=settings.max_decode_bytes,
            helper=Helper() if cores.available() > 1 else None,
            observe=metrics.decode.observe,
        ),
        cache=ResultCache(settings.cache_bytes),
        metrics=metrics,
        fetcher=_fetcher(settings),
    )


def make_model(
    info: ModelInfo, build: Callable[[], Encoder], settings: Settings, shared: Shared
) -> Model:
    """A model that is loaded by `build`, and then has a queue of its own."""

    def load() -> Vision:
        vision = Vision(
            build(),
            Limits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
            pool=shared.pool,
            cache=shared.cache,
            max_batch=settings.max_batch_size,
            max_waiting=settings.max_queue,
            max_waiting_bytes=settings.max_queue_bytes,
            metrics=shared.metrics,
            fetcher=shared.fetcher,
        )
        try:
            vision.warm_up()
        except BaseException:
            vision.close()
            raise
        return vision

    return Model(info=info, load=load)


def _fetcher(settings: Settings) -> Fetcher | None:
    if not settings.fetch_urls:
        return None
    return Fetcher(
        max_bytes=settings.max_image_bytes,
        timeout_s=settings.fetch_timeout_s,
        max_fetches=settings.max_fetches,
        allow=parse_allowances(settings.fetch_allow),
    )


def _named(given: str) -> NamedModel:
    name, model = _name_and_model(given)
    loaded = load_model(model)
    return loaded if name is None else replace(loaded, name=name)


def _name_and_model(given: str) -> tuple[str | None, str]:
    """`MODEL`, or `NAME=MODEL`; a path may hold "=" too."""
    named = re.fullmatch(r"([\w.-]+)=(.+)", given)
    return (None, given) if named is None else (named[1], named[2])
