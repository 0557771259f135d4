"""What the routes work with: put together once, in `service.app`."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from index.collection import Collection
from index.collection_set import CollectionSet
from index.errors import ModelMismatch
from service.errors import RequestError
from service.settings import Settings
from service.vision import Vision


@dataclass(frozen=True, kw_only=True)
class Services:
    """The model, the collections and the settings of a running service."""

    settings: Settings
    vision: Vision
    collections: CollectionSet

    @property
    def spaces(self) -> dict[str, int]:
        """The vectors of each picture: CLS for similarity, the copy descriptor for copies."""
        info = self.vision.info
        return {"cls": info.embedding_size, "copy": info.copy_embedding_size}

    def collection(self, name: str) -> Collection:
        """A collection whose vectors the served model can be compared with.

        Raises:
            CollectionNotFound, StoreDamaged: see `CollectionSet.get`.
            ModelMismatch: it was made with another model.
        """
        collection = self.collections.get(name)
        info = self.vision.info
        if collection.model != info.fingerprint:
            raise ModelMismatch(
                f"collection {name!r} holds vectors of the model {collection.model}, and this "
                f"service serves {info.fingerprint} ({info.name}); serve that model, or make a "
                "collection of another name and ingest the pictures again"
            )
        return collection

    def check_model(self, name: str | None) -> None:
        """Refuses a request for a model that is not served."""
        known = self.vision.info.name
        if name not in (None, known):
            raise RequestError(
                f"model {name!r} is not served here; served is {known!r}",
                code="model_not_found",
                param="model",
                status=404,
            )


def get_services(request: Request) -> Services:
    """The services of the application that a request came to."""
    return cast(Services, request.app.state.services)


Served = Annotated[Services, Depends(get_services)]
