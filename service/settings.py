"""The service's settings: the only reader of the environment (prefix DINOSCOPE_) and of `.env`."""

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    SettingsConfigDict,
)

from service.addresses import parse_allowances
from service.settings_help import PREFIX, Rule, complaints_of, unknown_of, variable

_CONFIG = SettingsConfigDict(env_prefix=PREFIX, env_file=".env", extra="ignore")
_FOR_TESTS = "dinoscope_golden"  # see CONTRIBUTING.md; the service has no use for it
_ORIGIN = re.compile(r"https?://[^/?#@\s]+")
_ROOT = re.compile(r"(/[A-Za-z0-9._~-]+)+")

S = TypeVar("S", bound=BaseSettings)


class InvalidSettings(ValueError):
    """Settings that cannot be: `complaints` holds a line for each, the message all of them."""

    def __init__(self, complaints: list[str]) -> None:
        super().__init__("; ".join(complaints))
        self.complaints = complaints


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


# In the environment, values with commas between them.
CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    for origin in origins:
        if not (_ORIGIN.fullmatch(origin) or origins == ("*",)):
            raise ValueError(
                f"{origin!r} must be an origin, such as https://example.com: scheme, host and "
                "port, no path; or * as the only value"
            )
    return origins


def _check_addresses(addresses: tuple[str, ...]) -> tuple[str, ...]:
    for address in addresses:
        if addresses != ("*",):
            try:
                ipaddress.ip_network(address)
            except ValueError as error:
                raise ValueError(
                    f"{address!r} must be an IP address or a network, such as 10.0.0.0/8; or * as "
                    f"the only value ({error})"
                ) from error
    return addresses


def _check_networks(networks: str) -> str:
    parse_allowances(networks)
    return networks


def _check_root(path: str) -> str:
    if path and (not _ROOT.fullmatch(path) or path == "/v1" or path.startswith("/v1/")):
        raise ValueError("must begin with / and not end with it, as /pictures does; not /v1")
    return path


def _check_file(value: Any) -> Any:
    if value == "":  # would be the current folder
        raise ValueError("must be a path; leave it out where no keys are asked for")
    return value


class Settings(BaseSettings):
    """Each field is the environment variable of its name, DINOSCOPE_MODEL for `model`."""

    model_config = _CONFIG

    model: Annotated[str, Rule("a name or a path")] = Field(
        default="default",
        min_length=1,
        description="default (the model in the repository), a known name, or a path to a model",
    )
    models: Annotated[CommaSeparated, Rule("models with commas between them")] = Field(
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
    precision: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32",
        description="fp32; bf16, for GPUs and processors that have it; int8, for processors that "
        "have it. Vectors of one are not compared with those of another",
    )
    host: Annotated[str, Rule("an address or a host's name")] = Field(
        default="127.0.0.1", min_length=1, description="address to listen on"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes any")
    root_path: Annotated[
        str,
        AfterValidator(_check_root),
        Rule("empty, or a path that begins with / and does not end with it; not /v1"),
    ] = Field(default="", description="the path below which a proxy shows the service")
    forwarded_allow_ips: Annotated[
        CommaSeparated,
        AfterValidator(_check_addresses),
        Rule("addresses or networks with commas between them, or *"),
    ] = Field(
        default=("127.0.0.1",),
        description="proxies whose X-Forwarded-For and X-Forwarded-Proto are believed",
    )
    keys_file: Annotated[Path | None, BeforeValidator(_check_file)] = Field(
        default=None,
        description="file of the bearer keys, made by python -m service.keys; none: no key is "
        "asked for",
    )
    cors_origins: Annotated[
        CommaSeparated,
        AfterValidator(_check_origins),
        Rule("origins such as https://example.com with commas between them, or *"),
    ] = Field(default=(), description="origins whose pages may call the service from a browser")
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
    max_batch_size: int = Field(
        default=32,
        ge=1,
        description="most pictures in one batch; on the CPU each core has a batch of its own, with "
        "its share of them or as many as make products large enough",
    )
    max_queue: int = Field(
        default=512, ge=1, description="most pictures waiting for the model; beyond it, 429"
    )
    max_queue_bytes: int = Field(
        default=512 * 2**20,
        ge=1,
        description="most bytes of prepared pictures waiting for the model; beyond it, 429",
    )
    deadline_seconds: float = Field(
        default=60.0,
        gt=0.0,
        allow_inf_nan=False,
        description="longest time from a read request to its pictures' results; beyond it, 429 "
        "for what still waits, 503 for what the model works on",
    )
    drain_seconds: int = Field(
        default=20,
        ge=0,
        description="time for requests under way after SIGTERM; then they are answered 503",
    )
    max_resolution: int = Field(
        default=0,
        ge=0,
        description="most pixels of a picture's short side that /v1/attention may ask the model to "
        "see; 0 is 480/224 of the model's crop",
    )
    max_decode_queue: int = Field(
        default=512, ge=1, description="most pictures that are decoded or wait for it; beyond, 429"
    )
    max_decode_bytes: int = Field(
        default=512 * 2**20, ge=1, description="most bytes of such pictures, encoded; beyond, 429"
    )
    cache_bytes: int = Field(
        default=64 * 2**20,
        ge=0,
        description="memory for results of pictures that may come again, in bytes; 0: none is kept",
    )
    decode_threads: int = Field(
        default=0,
        ge=0,
        description="pictures decoded side by side, beside one that came alone; "
        "0 is the number of cores, but 4 to 16",
    )
    torch_threads: int = Field(
        default=0,
        ge=0,
        description="cores that a model computes on; 0 is all that the process may use, by its "
        "affinity, OMP_NUM_THREADS and its container's limit",
    )
    fetch_urls: bool = Field(
        default=False, description="whether a picture in JSON may be an http(s) URL to fetch"
    )
    fetch_allow: Annotated[
        str,
        AfterValidator(_check_networks),
        Rule("networks, each with a port or without, with commas between them"),
    ] = Field(
        default="",
        description="networks, with ports other than 80 and 443, that may be fetched from though "
        "they are not public, separated by commas: 10.1.0.0/16, 10.2.0.0/16:8080, [fd00::/8]:8080",
    )
    fetch_timeout_s: float = Field(
        default=10.0, gt=0.0, le=600.0, description="longest time for one fetch, redirects included"
    )
    max_fetches: int = Field(default=8, ge=1, description="most pictures being fetched at once")
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="where traces go, e.g. http://127.0.0.1:4318/v1/traces; needs the extra "
        "'telemetry'",
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="of the log on stderr: an object a line, or text"
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        default="info", description="what is logged"
    )

    @model_validator(mode="after")
    def _queues_hold_a_request(self) -> Self:
        needed = 2 * self.max_request_images  # an upload asks for CLS and the copy descriptor
        if self.max_queue < needed:
            raise ValueError(
                f"{variable('max_queue')} = {self.max_queue}: the largest request needs {needed} "
                f"places (2 x {variable('max_request_images')}, {self.max_request_images})"
            )
        if self.max_decode_queue < self.max_request_images:
            raise ValueError(
                f"{variable('max_decode_queue')} = {self.max_decode_queue}: the largest request "
                f"needs {self.max_request_images} places ({variable('max_request_images')})"
            )
        if self.max_decode_bytes < self.max_request_bytes:
            raise ValueError(
                f"{variable('max_decode_bytes')} = {self.max_decode_bytes}: the largest request "
                f"needs {self.max_request_bytes} ({variable('max_request_bytes')})"
            )
        return self


class ClientSettings(BaseSettings):
    """What a client of the service reads, such as `python -m service.ingest`."""

    model_config = _CONFIG

    key: SecretStr | None = Field(default=None, description="the key to give to the service")


def load_settings() -> Settings:
    """The service's settings from the environment and `.env`.

    Raises:
        InvalidSettings: a value that cannot be, or a variable with our prefix that is no setting.
    """
    return _load(Settings)


def load_client_settings() -> ClientSettings:
    """A client's settings; see `load_settings`."""
    return _load(ClientSettings)


def _load(settings: type[S]) -> S:
    try:
        complaints = list(_unknown())
    except (OSError, UnicodeError) as error:
        raise InvalidSettings([f".env cannot be read: {error}"]) from error
    try:
        loaded = settings()
    except ValidationError as error:
        raise InvalidSettings([*complaints_of(error, settings), *complaints]) from error
    if complaints:
        raise InvalidSettings(complaints)
    return loaded


def _unknown() -> Iterator[str]:
    known = [variable(name) for cls in (Settings, ClientSettings) for name in cls.model_fields]
    given = {*EnvSettingsSource(Settings).env_vars, *DotEnvSettingsSource(Settings).env_vars}
    return unknown_of(given - {_FOR_TESTS}, known)
