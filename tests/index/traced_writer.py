"""A process whose disk keeps a diary: writes, saves, snapshots; test_power_loss.py cuts the power.

Each acknowledgement is written to a file beside the collections, so that it stands in the diary in
its place among the writes and syncs.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from index.collection_set import CollectionSet
from index.kinds import IndexSettings
from index.maintenance import BuildPolicy
from tests.index.fault_scenarios import batch
from tests.index.helpers import create

POLICY = BuildPolicy(save_rows=1, save_share=0, compact_rows=10, compact_share=0)


def main() -> None:
    root = Path(sys.argv[1])
    said = os.open(root / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(do: Callable[[], Any], *what: Any) -> None:
        for line in (["intends", *what], None, ["done", *what]):
            if line is None:
                do()
            else:
                os.write(said, f"{json.dumps(line)}\n".encode())

    with CollectionSet(root / "collections", policy=POLICY) as collections:
        tell(lambda: create(collections), "create")
        collection = collections.get("pictures")

        def write(first: int) -> None:
            for number in range(first, first + 12):
                tell(partial(collection.upsert, batch(number)), "upsert", number)
                if number % 3 == 2:
                    gone = [each.id for each in batch(number - 1)]
                    tell(partial(collection.delete, gone), "delete", number - 1)

        threads = [threading.Thread(target=write, args=(100 * each,)) for each in range(3)]
        for thread in threads:
            thread.start()
        collection.configure(IndexSettings(kind="hnsw"))
        tell(lambda: collections.snapshot("pictures"), "snapshot")
        for thread in threads:
            thread.join()
        collection.wait_until_built()
        # The log of writes is emptied into the main file, and begun anew by the next write.
        with collection._store.database.writing() as connection:
            connection.execute("SELECT 1 FROM records")
        collection._store.database._writer.execute("PRAGMA wal_checkpoint(RESTART)")
        write(300)
        name = collections.snapshots("pictures")[0].name
        tell(lambda: collections.restore("pictures", name), "restore")
        collection = collections.get("pictures")
        write(400)
    with CollectionSet(root / "collections", policy=POLICY) as collections:
        collection = collections.get("pictures")
        write(500)
        tell(lambda: collections.delete("pictures"), "delete_collection")


if __name__ == "__main__":
    main()
