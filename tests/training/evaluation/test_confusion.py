import torch

from training.evaluation.confusion import Confused, confusion_matrix, most_confused


def test_what_is_confused_most() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    taken = torch.tensor([0, 1, 1, 1, 1, 0, 0, 1])
    matrix = confusion_matrix(truth, taken, 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 2, 0], [2, 1, 0]]
    expected = [Confused(0, 1, 2, 3), Confused(2, 0, 2, 3), Confused(2, 1, 1, 3)]
    assert most_confused(matrix, 12) == expected
    assert most_confused(matrix, 1) == expected[:1]
    assert most_confused(torch.eye(3, dtype=torch.long), 5) == []
