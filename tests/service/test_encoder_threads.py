"""How many threads the encoder of a real network takes for a batch."""

from typing import Any

import pytest
import torch

from backbone.pretrained import NamedModel
from service.encoder import AttentionTask, Task, TorchEncoder
from service.torch_threads import Fastest
from tests.service.pictures import noise
from tests.service.tiny_network import write_tiny_network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NamedModel:
    return write_tiny_network(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def test_the_best_number_of_threads_is_that_of_inputs_about_as_large(
    model: NamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TorchEncoder(model, device="cpu", threads=4)
    assert encoder.batches_at_once == 4
    answers = iter([1, 1, 2])  # of the embeddings' size, the copies', and the finest

    def measured(*_: object) -> dict[int, float]:
        fast = next(answers)
        return {number: 0.0 if number == fast else 1.0 for number in (1, 2, 4)}

    monkeypatch.setattr("service.encoder.measured", measured)
    used: list[int] = []
    results = encoder._results

    def noted(*arguments: Any) -> Any:
        used.append(torch.get_num_threads())
        return results(*arguments)

    monkeypatch.setattr(encoder, "_results", noted)
    one = encoder.prepare("cls", noise(1, (48, 48)))
    encoder.run("cls", [one])
    encoder.run("cls", [one], at_once=3)
    encoder.run("cls", [one, one], at_once=9)
    assert used == [4, 1, 1]  # nothing was measured: its share of the cores
    fine = AttentionTask(block=11, resolution=encoder.info.max_resolution)
    tasks: tuple[Task, ...] = ("cls", "copy", AttentionTask(block=11), fine)
    assert encoder.info.tasks == tasks
    inputs = [encoder.prepare(task, noise(1, (48, 48))) for task in tasks]
    for task, one in zip(tasks, inputs, strict=True):
        encoder.warm_up(task, one, most=4)
    used.clear()
    for task, one in zip(tasks, inputs, strict=True):
        encoder.run(task, [one, one])
    nearly = AttentionTask(block=11, resolution=60)
    encoder.run(nearly, [encoder.prepare(nearly, noise(1, (60, 48)))])
    encoder.run(nearly, [encoder.prepare(nearly, noise(1, (60, 48)))], at_once=3)
    encoder.run(AttentionTask(block=None), [inputs[0]])
    assert used == [1, 1, 1, 2, 2, 1, 1]


def test_it_learns_how_long_a_lone_picture_takes(
    model: NamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.encoder.measured", lambda *_: {1: 2.0, 2: 1.0})
    told: list[int] = []
    monkeypatch.setattr(Fastest, "took", lambda _, number, __: told.append(number))
    encoder = TorchEncoder(model, device="cpu", threads=2)
    one = encoder.prepare("cls", noise(1, (48, 48)))
    encoder.run("cls", [one])  # nothing was measured
    encoder.warm_up("cls", one, most=4)
    told.clear()
    encoder.run("cls", [one])
    encoder.run("cls", [one], at_once=2)
    assert told == [2, 1]
    encoder.run("cls", [one, one])
    encoder.run(AttentionTask(block=None), [one])
    encoder.run(AttentionTask(block=11), [one[:, :16, :16]])  # its time says nothing of others
    assert told == [2, 1]
