from tests.training.conftest import command, finish


def test_processes_end_well_right_after_a_collective() -> None:
    launcher = command("torch.distributed.run", "--nproc-per-node=6", "--standalone", "-m")
    status, _, err = finish([*launcher, "tests.training.leaving_process"])
    assert status == 0, err
