"""A folder of pictures into a collection of a running service, with a progress bar.

    python -m service.ingest FOLDER --collection NAME [--url http://127.0.0.1:8000]

A service that asks for a key gets the one in DINOSCOPE_KEY, or of --key, which others on the same
machine can read while the command runs.

A picture's id is its path below the folder; its metadata tell the file's `name` and, in a nested
folder, its `label`, the folder that it lies in. Run it again to go on: what is there already, with
the same content, is not sent. Pictures that the service refuses are listed; the status is then 1.
"""

import argparse
import asyncio
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import httpx
from tqdm import tqdm

from backbone.pictures import SUFFIXES
from index.errors import InvalidName
from index.records import check_name
from service.settings import InvalidSettings, load_client_settings

_BUSY = (429, 503)
_MOST_TRIES = 8
_KEY = re.compile(r"[!-~]+")


class IngestError(Exception):
    """Nothing more can be sent; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 when all is stored, 1 when some were refused, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m service.ingest", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="searched for pictures, nested folders too")
    parser.add_argument("--collection", default="default", help="made where it does not exist")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--key", help="takes the place of DINOSCOPE_KEY")
    parser.add_argument("--parallel", type=int, default=8, help="requests under way at once")
    options = parser.parse_args(arguments)
    if options.parallel < 1:
        parser.error(f"--parallel is {options.parallel}; it must be at least 1")
    try:
        given = load_client_settings().key
        key = options.key or (given.get_secret_value() if given else None)
        counts, refused = asyncio.run(
            ingest(
                options.folder,
                options.collection,
                options.url,
                key=key,
                parallel=options.parallel,
            )
        )
    except (IngestError, InvalidSettings) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, reason in refused:
        print(f"refused: {path}: {reason}", file=sys.stderr)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if refused else 0


async def ingest(
    folder: Path, collection: str, url: str, *, key: str | None = None, parallel: int = 8
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Sends every picture below `folder`; counts by outcome, and (path, reason) of the refused.

    Raises:
        IngestError: no such folder, no picture in it, a name that no collection can have, or a
            service that cannot be used.
    """
    if not folder.is_dir():
        raise IngestError(f"{str(folder)!r} is not a folder")
    paths = sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES and p.is_file()
    )
    if not paths:
        raise IngestError(f"{str(folder)!r} holds no picture ({', '.join(sorted(SUFFIXES))})")
    try:
        check_name(collection)  # one with a slash would be another path
    except InvalidName as error:
        raise IngestError(str(error)) from error
    if key and not _KEY.fullmatch(key):  # httpx would show it in its error
        raise IngestError("the key must be of visible ASCII characters, without spaces")
    limits = httpx.Limits(max_connections=parallel)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with httpx.AsyncClient(
            base_url=url, timeout=120.0, limits=limits, headers=headers
        ) as client:
            _check(await client.put(f"/v1/collections/{collection}"))
            known = await _known(client, collection)
            return await _send_all(client, folder, collection, paths, known, parallel)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise IngestError(f"the service at {url} cannot be used: {error!r}") from error


async def _send_all(
    client: httpx.AsyncClient,
    folder: Path,
    collection: str,
    paths: list[str],
    known: dict[str, str | None],
    parallel: int,
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    counts = {"created": 0, "updated": 0, "unchanged": 0, "refused": 0}
    refused: list[tuple[str, str]] = []
    waiting: Iterator[str] = iter(paths)
    with tqdm(total=len(paths), unit="picture", dynamic_ncols=True) as bar:

        async def work() -> None:
            for path in waiting:
                try:
                    path.encode()  # names that are not text cannot be ids
                    content = await asyncio.to_thread((folder / path).read_bytes)
                except (OSError, UnicodeEncodeError) as error:
                    refused.append((path, f"cannot be read: {error}"))
                    outcome = "refused"
                else:
                    if known.get(path) == hashlib.sha256(content).hexdigest():
                        outcome = "unchanged"
                    else:
                        outcome = await _send(client, collection, path, content, refused)
                counts[outcome] += 1
                bar.update()

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(parallel):
                    tasks.create_task(work())
        except ExceptionGroup as errors:
            # One worker's trouble ends them all; the first tells what it was.
            raise errors.exceptions[0] from errors
    return counts, refused


async def _send(
    client: httpx.AsyncClient,
    collection: str,
    path: str,
    content: bytes,
    refused: list[tuple[str, str]],
) -> str:
    """The picture's outcome; one that was refused is added to `refused` with the reason."""
    place = PurePosixPath(path)
    metadata = {"name": place.name, **({"label": place.parent.name} if place.parent.name else {})}
    for attempt in range(_MOST_TRIES):
        response = await client.post(
            f"/v1/collections/{collection}/images",
            files={"image": (path, content)},
            data={"id": path, "metadata": json.dumps(metadata)},
        )
        if response.status_code not in _BUSY or attempt == _MOST_TRIES - 1:
            break
        await asyncio.sleep(float(response.headers.get("Retry-After", 1)) * 2**attempt)
    if response.status_code in (400, 413, 415):
        refused.append((path, _message(response)))
        return "refused"
    _check(response)
    return str(response.json()["images"][0]["outcome"])


async def _known(client: httpx.AsyncClient, collection: str) -> dict[str, str | None]:
    """id -> content hash of what the collection holds."""
    found: dict[str, str | None] = {}
    cursor: str | None = None
    while True:
        query = {"limit": "1000", **({"cursor": cursor} if cursor else {})}
        response = _check(await client.get(f"/v1/collections/{collection}/images", params=query))
        page = response.json()
        found |= {image["id"]: image["content_hash"] for image in page["images"]}
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def _check(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise IngestError(
        f"{response.request.url} answers {response.status_code}: {_message(response)}"
    )


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


if __name__ == "__main__":
    sys.exit(main())
