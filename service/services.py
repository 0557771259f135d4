"""What the routes work with: put together once, in `service.app`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import anyio.to_thread
from fastapi import Depends, Request

from index.collection import Collection
from index.collection_set import CollectionSet
from index.errors import ModelMismatch
from service.encoder import ModelInfo
from service.models import Models
from service.settings import Settings
from service.vision import Vision


@dataclass(frozen=True, kw_only=True)
class Services:
    """The models, the collections and the settings of a running service."""

    settings: Settings
    models: Models
    collections: CollectionSet

    async def vision(self, model: str | None) -> Vision:
        """A served model, the default without a name; see `Models.vision`."""
        ready = self.models.ready(model)
        if ready is not None:
            return ready
        return await anyio.to_thread.run_sync(self.models.vision, model)

    @property
    def visions(self) -> Sequence[Vision]:
        """Every model that is loaded; each has threads of its own to look after."""
        return self.models.loaded

    async def open(self, name: str) -> tuple[Collection, Vision]:
        """A collection, and the model that its vectors are of.

        Raises:
            CollectionNotFound, StoreDamaged: see `CollectionSet.get`.
            ModelMismatch: it was made with a model that is not served.
        """

        def find() -> tuple[Collection, Vision]:
            collection = self.collections.get(name)
            return collection, self.models.vision(self.model_of(collection).name)

        return await anyio.to_thread.run_sync(find)

    def model_of(self, collection: Collection) -> ModelInfo:
        """The served model that a collection's vectors are of.

        Raises:
            ModelMismatch: it is not served.
        """
        info = self.models.of_fingerprint(collection.model)
        if info is None:
            served = ", ".join(f"{each.fingerprint} ({each.name})" for each in self.models.infos)
            raise ModelMismatch(
                f"collection {collection.name!r} holds vectors of the model {collection.model}, "
                f"and this service serves {served}; serve that model too (DINOSCOPE_MODELS), or "
                "make a collection of another name and ingest the pictures again"
            )
        return info


def spaces_of(info: ModelInfo) -> dict[str, int]:
    """The vectors of each picture: CLS for similarity, the copy descriptor for copies."""
    return {"cls": info.embedding_size, "copy": info.copy_embedding_size}


def services_of(request: Request) -> Services:
    """The services of the application that a request came to; it comes when they are there."""
    return cast(Services, request.app.state.lifecycle.services)


async def get_services(request: Request) -> Services:
    """As `services_of`; a coroutine, because FastAPI calls a plain function in a thread."""
    return services_of(request)


Served = Annotated[Services, Depends(get_services)]
