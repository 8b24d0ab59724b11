"""Whether a layer calls its norms or has folded them."""

from torch.utils._python_dispatch import TorchDispatchMode


class CountNorms(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 'batch_norm' in str(func)
        return func(*args, **(kwargs or {}))


def count_norms(layer, x):
    """How often torch normalises in a call of ``layer``."""
    with CountNorms() as mode:
        layer(x)
    return mode.count
