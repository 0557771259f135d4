"""How often a service finds a photograph's original from a crop of it that was saved again.

    python benchmarks/crop_search.py FOLDER --collection NAME [--url URL] [--json]

FOLDER was ingested into the collection before. For each of 100 pictures and each kind of crop (80%
of the area anywhere, 80% of each side anywhere, 80% of each side in the centre; JPEG quality 85) it
counts how often the original is the first match of search, and of copies.
"""

import argparse
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import httpx
from PIL import Image

KINDS: dict[str, tuple[float, bool]] = {
    "area_anywhere": (0.8**0.5, False),
    "sides_anywhere": (0.8, False),
    "sides_centre": (0.8, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--collection", default="default")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    paths = sorted(options.folder.glob("*.jpg"))
    chosen = rng.sample(paths, min(options.count, len(paths)))
    results: dict[str, dict[str, int]] = {}
    base = f"/v1/collections/{options.collection}"
    with httpx.Client(base_url=options.url, timeout=60.0) as client:
        for kind, (share, centred) in KINDS.items():
            queries = [(path.name, crop(path, share, centred, rng)) for path in chosen]
            results[kind] = {
                route: sum(first(client, f"{base}/{route}", q) == name for name, q in queries)
                for route in ("search", "copies")
            }
            if not options.json:
                print(f"{kind}: of {len(queries)}, first by {results[kind]}")
    if options.json:
        print(json.dumps({"of": len(chosen), **results}))


def crop(path: Path, share: float, centred: bool, rng: random.Random) -> bytes:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    width, height = (round(side * share) for side in picture.size)
    spare = (picture.width - width, picture.height - height)
    place: Callable[[int], int] = (lambda n: n // 2) if centred else (lambda n: rng.randint(0, n))
    left, top = place(spare[0]), place(spare[1])
    buffer = io.BytesIO()
    picture.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def first(client: httpx.Client, url: str, picture: bytes) -> str:
    answer = client.post(url, params={"k": 1}, files={"image": picture})
    answer.raise_for_status()
    return str(answer.json()["matches"][0]["id"])


if __name__ == "__main__":
    main()
