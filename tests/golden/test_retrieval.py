import numpy as np
import pytest
import torch

from tests.golden.conftest import Golden
from training.evaluation.copy_whitening import Moments
from training.evaluation.ranking import Relevant, average_precision, ranked_figures


def test_landmarks_map_and_mean_precision(golden: Golden) -> None:
    settings = golden["retrieval"]
    truth = [Relevant(query["ok"], query["junk"]) for query in settings["gnd"]]
    kappas = settings["kappas"]
    found = ranked_figures(np.array(settings["ranks"]), truth, kappas)
    assert found.map == pytest.approx(settings["map"])
    assert found.aps == [None if ap is None else pytest.approx(ap) for ap in settings["aps"]]
    assert [found.mp_at[k] for k in kappas] == pytest.approx(settings["mp_at"])
    assert [found.mp_at_as_published[k] for k in kappas] == pytest.approx(
        settings["mp_at_as_published"]
    )


def test_average_precision_of_copies(golden: Golden) -> None:
    for case in golden["copy_ap"]:
        assert average_precision(case["ranks"], case["positives"]) == pytest.approx(case["ap"])


def test_whitening_is_uncentred_as_in_the_original(golden: Golden) -> None:
    tensors = golden.tensors("evaluation")
    background, queries = tensors["whiten_background"], tensors["whiten_query"]
    moments = Moments(background.shape[1], torch.device("cpu"))
    for batch in background.split(64):
        moments.add(batch)
    whitening = moments.whitening(centred=False)
    similarity = whitening(queries) @ whitening(background).T
    torch.testing.assert_close(similarity, tensors["whiten_similarity"], atol=1e-4, rtol=0)
    centred = moments.whitening(centred=True)
    assert not torch.allclose(centred(queries) @ centred(background).T, similarity, atol=1e-2)
