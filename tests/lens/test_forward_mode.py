import torch

from dt_lens.lens.forward_mode import flushing_denormals


def test_products_take_denormal_numbers_for_zero_inside_and_as_before_outside() -> None:
    small = torch.full((64,), 1e-40)
    with flushing_denormals():
        assert (small * 1).sum() == 0
        with flushing_denormals():
            assert (small * 1).sum() == 0
        assert (small * 1).sum() == 0  # an inner one does not end the outer one
    assert (small * 1).sum() > 0
