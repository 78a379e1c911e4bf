"""Work on a second stream: what runs there is done when the current stream goes on. Needs a GPU."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.ops.gradient.beside import Beside

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no streams")
SIZE = 4096


def test_each_stream_reads_what_the_other_wrote_and_may_drop_it():
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)
    factor = torch.randn(SIZE, SIZE, generator=generator, device=device) / SIZE**0.5
    x = torch.randn(SIZE, SIZE, generator=generator, device=device)
    expected = x
    for _ in range(6):
        expected = (expected @ factor + expected) / 2 + expected @ factor
    for _ in range(5):
        got = x.clone()
        for _ in range(6):
            # made in one stream, read in the other; all of it is dropped at once, for either's next tensors
            before = got + 0
            beside = Beside(device)
            with beside:
                mean = (before @ factor + before) / 2
            product = before @ factor
            beside.join()
            got = mean + product
            del before, mean, product
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_current_stream_is_the_same_afterwards_also_after_an_error():
    device = torch.device("cuda", torch.cuda.current_device())
    current = torch.cuda.current_stream(device)
    with pytest.raises(ValueError, match="inside"), Beside(device):
        assert torch.cuda.current_stream(device) != current
        raise ValueError("inside")
    assert torch.cuda.current_stream(device) == current
