import pytest

from index.errors import InvalidSettings
from index.kinds import (
    FLAT_UP_TO,
    HNSW_UP_TO,
    TRAINABLE_FROM,
    IndexSettings,
    Kind,
    check_fit,
    check_metric,
    choose_kind,
    pq_bytes_for,
)

AUTO = IndexSettings()


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (0, "flat"),
        (FLAT_UP_TO, "flat"),
        (FLAT_UP_TO + 1, "hnsw"),
        (HNSW_UP_TO, "hnsw"),
        (HNSW_UP_TO + 1, "ivf_sq8"),
    ],
)
def test_auto_goes_by_the_number_of_rows(rows: int, kind: Kind) -> None:
    assert choose_kind(AUTO, rows) == kind


def test_a_few_removed_rows_do_not_undo_a_build() -> None:
    assert choose_kind(AUTO, FLAT_UP_TO, "hnsw") == "hnsw"
    assert choose_kind(AUTO, FLAT_UP_TO * 4 // 5 + 1, "hnsw") == "hnsw"
    assert choose_kind(AUTO, FLAT_UP_TO * 4 // 5 - 1, "hnsw") == "flat"
    assert choose_kind(AUTO, FLAT_UP_TO + 1, "flat") == "hnsw"
    assert choose_kind(AUTO, HNSW_UP_TO - 5, "ivf_sq8") == "ivf_sq8"
    assert choose_kind(AUTO, HNSW_UP_TO // 2, "ivf_sq8") == "hnsw"
    trained = IndexSettings(kind="ivf_pq")
    assert choose_kind(trained, TRAINABLE_FROM - 1) == "flat"
    assert choose_kind(trained, TRAINABLE_FROM - 1, "ivf_pq") == "ivf_pq"
    assert choose_kind(trained, TRAINABLE_FROM // 2, "ivf_pq") == "flat"
    # What was asked for is not kept from coming by what is there.
    assert choose_kind(IndexSettings(kind="flat"), 10_000, "hnsw") == "flat"


def test_bytes_of_a_code() -> None:
    assert [pq_bytes_for(AUTO, dimension) for dimension in (1, 7, 64, 384)] == [1, 1, 16, 96]
    assert pq_bytes_for(IndexSettings(pq_bytes=8), 64) == 8
    check_fit(IndexSettings(pq_bytes=8), {"cls": 64, "copy": 128})
    with pytest.raises(InvalidSettings, match="pq_bytes must divide the dimension, 100, got 8"):
        check_fit(IndexSettings(pq_bytes=8), {"cls": 64, "copy": 100})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "tree"}, "kind must be one of auto, flat, hnsw, ivf_sq8, ivf_pq, mapped"),
        ({"hnsw_m": 2}, "hnsw_m must be a whole number from 4 to 256, got 2"),
        ({"hnsw_m": True}, "hnsw_m must be a whole number"),
        ({"ef_construction": 1e3}, "ef_construction must be a whole number from 8 to 2048"),
        ({"lists": 0}, "lists must be a whole number from 1"),
        ({"target_recall": 0}, r"target_recall must be in \(0, 1\], got 0"),
        ({"target_recall": "all"}, "target_recall must be in"),
        ({"efConstruction": 3}, "unknown index settings efConstruction; known are kind, hnsw_m"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        IndexSettings.from_dict(wrong)


def test_settings_come_back_from_what_they_give() -> None:
    settings = IndexSettings(kind="ivf_pq", lists=7, target_recall=0.5)
    assert IndexSettings.from_dict(settings.to_dict()) == settings
    assert IndexSettings.from_dict({}) == AUTO


def test_a_metric_that_there_is_not() -> None:
    assert check_metric("l2") == "l2"
    with pytest.raises(InvalidSettings, match="metric must be one of cosine, ip, l2"):
        check_metric("hamming")
