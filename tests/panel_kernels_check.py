"""The panel kernels against the plain path, on the CPU by Triton's interpreter. Run by test_panels.py, in a process of
its own: the interpreter must be chosen before the kernels are imported."""

import itertools

import torch
from panel_cases import case

from graftlm import panel_kernels
from graftlm.panels import add_all, put_all, take_all


def main() -> None:
    dtypes = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
    for (weight_dtype, panel_dtype), seed in itertools.product(dtypes, range(4)):
        places, weights = case(seed, weight_dtype)
        plain = take_all(places, weights)
        assert torch.equal(panel_kernels.take(places, weights), plain), (weight_dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        panels = torch.randn(plain.shape, generator=generator, dtype=torch.float64).to(panel_dtype)
        parts = panels.split([place.slots for place in places])
        if seed % 2:  # in another order in memory
            parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
        for fast, slow in ((panel_kernels.put_, put_all), (panel_kernels.add_, add_all)):
            ours, theirs = ([w.clone() for w in weights] for _ in range(2))
            fast(places, ours, parts)
            slow(places, theirs, parts)
            for one, other, before in zip(ours, theirs, weights, strict=True):
                # The interpreter rounds to bfloat16 towards zero, a GPU to the nearest.
                last_bit = 2**-7 if weight_dtype == torch.bfloat16 else 0.0
                torch.testing.assert_close(one, other, rtol=last_bit, atol=last_bit * float(before.abs().max()))
                assert not torch.equal(one, before)


if __name__ == "__main__":
    main()
