"""The service's settings: the only reader of the environment (prefix DINOSCOPE_) and of `.env`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Each field is the environment variable of its name, DINOSCOPE_MODEL for `model`."""

    model_config = SettingsConfigDict(env_prefix="DINOSCOPE_", env_file=".env", extra="ignore")

    model: str = Field(
        default="default",
        description="default (the model in the repository), a known name, or a path to a model",
    )
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="more models to serve beside it, between commas, each as for model, or as "
        "NAME=MODEL to choose the name that it goes by",
    )
    load_models: Literal["start", "lazy"] = Field(
        default="start",
        description="when those in models are loaded: at the start, or when first asked for",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the model runs; auto takes CUDA where there is one"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes any")
    data_dir: Path = Field(
        default=Path("collections"), description="folder of the collections; one process owns it"
    )
    max_image_bytes: int = Field(
        default=32 * 2**20, ge=1, description="largest encoded picture, in bytes"
    )
    max_image_pixels: int = Field(
        default=100_000_000,
        ge=1,
        le=178_956_970,  # beyond it Pillow refuses by itself
        description="largest picture, width x height, before decoding",
    )
    max_request_images: int = Field(default=64, ge=1, description="most pictures in one request")
    max_request_bytes: int = Field(
        default=256 * 2**20, ge=1, description="largest request body, in bytes"
    )
    max_requests: int = Field(
        default=64, ge=1, description="most requests with pictures under way at once; beyond, 429"
    )
    max_batch_size: int = Field(default=32, ge=1, description="most pictures in one forward pass")
    max_queue: int = Field(
        default=512, ge=1, description="most pictures waiting for the model; beyond it, 429"
    )
    attention_pixels: int = Field(
        default=0,
        ge=0,
        description="short side at which attention is computed; 0 is 480/224 of the model's crop",
    )
    decode_threads: int = Field(default=4, ge=1, description="pictures decoded side by side")
    torch_threads: int = Field(default=0, ge=0, description="the model's threads; 0 is torch's own")
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        default="info", description="what is logged"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _by_commas(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @model_validator(mode="after")
    def _queue_holds_a_request(self) -> Self:
        needed = 2 * self.max_request_images  # an upload asks for CLS and the copy descriptor
        if self.max_queue < needed:
            raise ValueError(
                f"max_queue is {self.max_queue}; the largest request needs {needed} places "
                f"(2 x max_request_images, {self.max_request_images})"
            )
        return self
