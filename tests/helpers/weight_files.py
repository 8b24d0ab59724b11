"""What the tests of ``weights/`` share: small weights, and files that would run code."""

import io

import torch

TINY = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16, in_chans=1, small_stem=True)


def assert_identical(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].cpu(), tensor.cpu()), name


def differ(a, b):
    return [name for name in a if not torch.equal(a[name].cpu(), b[name].cpu())]


class RunsCode:
    """Calls a function as it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def saved(checkpoint, **kwargs):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, **kwargs)
    return buffer.getvalue()
