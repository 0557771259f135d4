"""A short form of the benchmarks: that they run and say what they promise, not what they find."""

import json
import sys

from tests.training.conftest import finish


def test_training_against_the_textbook() -> None:
    sizes = ["--global-size=32", "--local-size=16", "--locals=1", "--k=64", "--batch=4"]
    short = ["--steps=1", "--rounds=1", "--workers=1", "--device=cpu", "--json"]
    status, out, err = finish([sys.executable, "benchmarks/training.py", *sizes, *short])
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    for name in ("step_ratio", "end_to_end_ratio"):
        assert found[name] > 0
        assert found[f"{name}_same_precision"] > 0
    assert set(found["end_to_end"]) >= {"textbook", "ours"}


def test_extraction_against_the_forward() -> None:
    sizes = ["--architecture=vit_tiny", "--size=32", "--batch=4", "--pictures=5"]
    short = ["--rounds=1", "--queries=6", "--bank=50", "--k=3", "--device=cpu", "--json"]
    status, out, err = finish([sys.executable, "benchmarks/extraction.py", *sizes, *short])
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    for name in ("extraction_ratio", "knn_seconds", "queries_seconds", "knn_vs_extraction"):
        assert found[name] > 0
    assert found["settings"]["workers"] == 0
