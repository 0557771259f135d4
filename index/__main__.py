"""Look after a folder of collections while no service has it.

    python -m index list FOLDER
    python -m index stats FOLDER NAME
    python -m index check FOLDER [NAME]           status 1 when there is a fault
    python -m index rebuild FOLDER NAME
    python -m index snapshot FOLDER NAME
    python -m index snapshots FOLDER NAME
    python -m index restore FOLDER NAME SNAPSHOT
    python -m index export FOLDER NAME FILE [--filter JSON]
    python -m index import FOLDER NAME FILE [--new]

FILE ends in .jsonl, .jsonl.gz or .parquet. With --json, what is printed is one JSON value. The
status is 0 when all went well and 2 when something could not be done; the reason then stands on
stderr.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from index.collection_set import CollectionSet
from index.errors import CollectionError, StoreDamaged
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
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")  # to stderr
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
        if name != "list":
            number = "?" if name == "check" else None
            command.add_argument("name", metavar="NAME", nargs=number, help="of a collection")
        return command

    add("list", _list, "what collections there are")
    add("stats", _stats, "what is known of a collection")
    add("check", _check, "look for faults in a collection, or in all; status 1 when there are any")
    add("rebuild", _rebuild, "build a collection's search structure anew")
    add("snapshot", _snapshot, "keep a copy of a collection as it is now")
    add("snapshots", _snapshots, "what snapshots a collection has")
    command = add("restore", _restore, "put a collection back to a snapshot")
    command.add_argument("snapshot", metavar="SNAPSHOT", help="its name in `snapshots`")
    command = add("export", _export, "write a collection to a file, which must not exist")
    command.add_argument("file", metavar="FILE", type=Path, help=".jsonl, .jsonl.gz or .parquet")
    command.add_argument("--filter", metavar="JSON", type=_json, help="on the records' metadata")
    command = add("import", _import, "upsert an export into a collection")
    command.add_argument("file", metavar="FILE", type=Path, help="what `export` wrote")
    command.add_argument("--new", action="store_true", help="make the collection")
    return parser


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error


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


def _stats(collections: CollectionSet, options: Options) -> int:
    collection = collections.get(options.name)
    found = asdict(collection.stats()) | {"settings": collection.settings.to_dict()}
    if options.json:
        _show(found, options)
    else:
        _show([{"name": name, "value": value} for name, value in _leaves(found)], options)
    return 0


def _check(collections: CollectionSet, options: Options) -> int:
    names = collections.names() if options.name is None else [options.name]
    rows = list[Row]()
    for name in names:
        try:
            faults = collections.get(name).check()
        except StoreDamaged as damage:
            faults = [str(damage)]
        rows.append({"name": name, "faults": faults})
    _show(rows, options)
    return 1 if any(row["faults"] for row in rows) else 0


def _rebuild(collections: CollectionSet, options: Options) -> int:
    collections.get(options.name).rebuild()
    _show({"rebuilt": options.name}, options)
    return 0


def _snapshot(collections: CollectionSet, options: Options) -> int:
    _show(asdict(collections.snapshot(options.name)), options)
    return 0


def _snapshots(collections: CollectionSet, options: Options) -> int:
    _show([asdict(each) for each in collections.snapshots(options.name)], options)
    return 0


def _restore(collections: CollectionSet, options: Options) -> int:
    collections.restore(options.name, options.snapshot)
    _show({"restored": options.name, "snapshot": options.snapshot}, options)
    return 0


def _export(collections: CollectionSet, options: Options) -> int:
    collection = collections.get(options.name)
    with (
        writing_export(options.file) as (file, format),  # noqa: A001
        _bar(collection.count() if options.filter is None else None) as bar,
    ):
        count = export_records(
            collection, file, format=format, filter=options.filter, progress=bar.update
        )
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
    if value is None or value == []:
        return "-"
    if isinstance(value, float):
        if key.endswith("_at"):
            return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(name, each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(_cell(key, each) for each in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _leaves(found: Row, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values within dictionaries, as "spaces.cls.kind" and the text to show."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _cell(name, value)


if __name__ == "__main__":
    sys.exit(main())
