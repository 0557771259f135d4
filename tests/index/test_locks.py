import threading

from index.locks import Pace, ReadWriteLock


def test_readers_share_the_lock_and_a_writer_is_alone() -> None:
    lock, log = ReadWriteLock(), list[str]()

    def write() -> None:
        with lock.writing():
            log.append("write")

    def read() -> None:
        with lock.reading():
            log.append("read")

    with lock.reading():
        with lock.reading():
            writer = threading.Thread(target=write)
            writer.start()
            writer.join(0.1)
        late_reader = threading.Thread(target=read)
        late_reader.start()
        late_reader.join(0.1)
        assert log == []  # the reader lets the waiting writer go first
        assert lock.readers_waiting == 1
    writer.join(10)
    late_reader.join(10)
    assert log == ["write", "read"]
    with lock.writing():
        reader = threading.Thread(target=read)
        reader.start()
        reader.join(0.1)
        assert log == ["write", "read"]
    reader.join(10)
    assert log == ["write", "read", "read"]
    assert lock.readers_waiting == 0


def test_a_pace_finds_how_many_fit_and_grows_no_faster_than_twofold() -> None:
    pace = Pace(0.02, first=16)
    assert pace.items == 16
    pace.record(16, 16 * 1e-4)  # 200 would fit
    assert pace.items == 32
    for _ in range(5):
        pace.record(pace.items, pace.items * 1e-4)
    assert pace.items == 200


def test_a_slow_hold_counts_at_once_and_a_quick_one_by_halves() -> None:
    pace = Pace(0.02, first=100)
    pace.record(100, 0.2)  # 2 ms each
    assert pace.items == 10
    pace.record(10, 0.01)  # 1 ms each, so 1.5 are reckoned with
    assert pace.items == 13
    pace.record(13, 26.0)
    assert pace.items == 1  # never none
