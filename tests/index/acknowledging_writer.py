"""A process to be killed: writes without end and prints a line for each acknowledged write."""

import itertools
import sys
from pathlib import Path

from index.collection_set import CollectionSet
from tests.index.helpers import create, record


def main() -> None:
    with CollectionSet(Path(sys.argv[1])) as collections:
        collection = create(collections)
        for number in itertools.count():
            collection.upsert([record(f"a{number}", number), record(f"b{number}", number)])
            print(f"upserted {number}", flush=True)
            if number % 3 == 2:
                collection.delete([f"a{number - 1}"])
                print(f"deleted {number - 1}", flush=True)


if __name__ == "__main__":
    main()
