"""Who makes what of a network's first weights; layouts themselves: test_zero_equality.py."""

import torch

from train.engine.backend.layout import makers_of


def test_each_process_makes_about_as_many_weights() -> None:
    sizes = [1280 * 2560 * 9] * 7 + [1280 * 1280] * 40 + [1280] * 100
    shapes = {f"p{i}": torch.Size([size]) for i, size in enumerate(sizes)}
    for processes in (1, 3, 8, 512):
        makers = makers_of(shapes, shapes, processes)
        loads = [sum(shapes[name].numel() for name in shapes if makers[name] == p) for p in range(processes)]
        assert makers.keys() == shapes.keys() and sum(loads) == sum(sizes)
        assert max(loads) <= max(sizes[0], sum(sizes) / processes + sizes[7])
