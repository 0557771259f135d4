"""Look after a folder of collections while no service has it.

    python -m index list FOLDER
    python -m index export FOLDER NAME FILE       FILE ends in .jsonl, .jsonl.gz or .parquet
    python -m index import FOLDER NAME FILE [--new]

With --json, what is printed is one JSON value. The status is 0 when all went well and 2 when
something could not be done; the reason then stands on stderr.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from index.collection import CollectionSet
from index.errors import CollectionError
from index.export_file import reading_export, writing_export
from index.transfer import export_records, import_new, import_records

Options = argparse.Namespace
Row = Mapping[str, Any]
Command = Callable[[CollectionSet, Options], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the status that the process should end with."""
    options = _parser().parse_args(arguments)
    folder: Path = options.folder
    if not folder.is_dir():  # opening it would make it
        print(f"error: {str(folder)!r} is not a folder", file=sys.stderr)
        return 2
    run: Command = options.run
    try:
        with CollectionSet(folder) as collections:
            return run(collections, options)
    except (CollectionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; whatever was acknowledged is stored", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON in place of tables")
        command.add_argument("folder", metavar="FOLDER", type=Path, help="holds the collections")
        return command

    add("list", _list, "what collections there are")
    command = add("export", _export, "write a collection to a file, which must not exist")
    command.add_argument("name", metavar="NAME")
    command.add_argument("file", metavar="FILE", type=Path, help=".jsonl, .jsonl.gz or .parquet")
    command = add("import", _import, "upsert an export into a collection")
    command.add_argument("name", metavar="NAME")
    command.add_argument("file", metavar="FILE", type=Path, help="what `export` wrote")
    command.add_argument("--new", action="store_true", help="make the collection")
    return parser


def _list(collections: CollectionSet, options: Options) -> int:
    rows = list[dict[str, Any]]()
    for name in collections.names():
        row: dict[str, Any] = {"name": name}
        if name in collections.damaged:
            row |= dict.fromkeys(("records", "spaces", "model", "created_at"))
            row["damaged"] = str(collections.damaged[name])
        else:
            collection = collections.get(name)
            row["records"] = collection.count()
            row["spaces"] = collection.spaces
            row["model"] = collection.model
            row["created_at"] = collection.created_at
            row["damaged"] = None
        rows.append(row)
    _show(rows, options)
    return 0


def _export(collections: CollectionSet, options: Options) -> int:
    collection = collections.get(options.name)
    with (
        writing_export(options.file) as (file, format),  # noqa: A001
        _bar(collection.count()) as bar,
    ):
        count = export_records(collection, file, format=format, progress=bar.update)
    _show({"file": str(options.file), "records": count}, options)
    return 0


def _import(collections: CollectionSet, options: Options) -> int:
    source = str(options.file)
    with reading_export(options.file) as (file, format), _bar(None) as bar:  # noqa: A001
        if options.new:
            counts = import_new(
                collections, options.name, file, format=format, source=source, progress=bar.update
            )
        else:
            counts = import_records(
                collections.get(options.name),
                file,
                format=format,
                source=source,
                progress=bar.update,
            )
    _show({"file": source, **counts}, options)
    return 0


def _bar(total: int | None) -> "tqdm[Any]":
    # None: no bar where stderr is not a terminal.
    return tqdm(total=total, unit="record", dynamic_ncols=True, disable=None)


def _show(found: Row | Sequence[Row], options: Options) -> None:
    """A row, or rows with the same keys, as a table or as JSON."""
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    rows = [found] if isinstance(found, Mapping) else found
    if not rows:
        print("none")
        return
    lines = [list(rows[0]), *([_cell(*item) for item in row.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def _cell(key: str, value: object) -> str:
    if value is None:
        return "-"
    if key.endswith("_at") and isinstance(value, float):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(name, each)}" for name, each in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
