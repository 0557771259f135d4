#!/usr/bin/env bash
# Draws docs/attention.png from three of docs/pictures, with a service that runs at $URL.
set -euo pipefail
cd "$(dirname "$0")"
url=${URL:-http://127.0.0.1:8000}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for name in astronaut chelsea rocket; do
  for head in mean all; do
    curl -sf -F "image=@pictures/$name.jpg" -o "$scratch/$name-$head.png" \
      "$url/v1/attention?head=$head&size=240&resolution=137&colormap=inferno&overlay=0.75"
  done
done
"${PYTHON:-python3}" - "$scratch" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image

scratch = Path(sys.argv[1])
rows = []
for name in ("astronaut", "chelsea", "rocket"):
    mean, heads = (Image.open(scratch / f"{name}-{head}.png") for head in ("mean", "all"))
    original = Image.open(f"pictures/{name}.jpg").resize(mean.size)
    rows.append([original, mean, heads])
width = max(sum(part.width + 4 for part in row) for row in rows)
sheet = Image.new("RGB", (width, sum(row[0].height + 4 for row in rows)), "white")
y = 0
for row in rows:
    x = 0
    for part in row:
        sheet.paste(part, (x, y))
        x += part.width + 4
    y += row[0].height + 4
sheet.quantize(256).save("attention.png", optimize=True)
PYTHON
