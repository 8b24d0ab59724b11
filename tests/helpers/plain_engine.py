"""The GPU's engine without a GPU or Triton: plain torch in its place, so that what is fused is seen and compared."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from sk_plugins.ops import cpu, functions, gate, gpu, private
from sk_plugins.ops.reference import norm_relu_select


def norm_act(spec, *tensors):
    if spec.batch:
        private.add_one(spec.batches)
        for y, running in zip(tensors[1::5], spec.running):
            F.batch_norm(y.detach(), *running, None, None, True, spec.momentum, spec.eps)
    return functions._norm_act(spec, *tensors), []


def norm_act_backward(spec, shortcut, saved, grad, needs_maps, *norms):
    tensors = [None if tensor is None else tensor.detach() for tensor in (shortcut, *norms)]
    wanted = [i for i, tensor in enumerate(tensors) if tensor is not None and (i == 0 or (i - 1) % 5 < 3)]
    for i in wanted:
        tensors[i].requires_grad_()
    with torch.enable_grad():
        output = functions._norm_act(spec, *tensors)
    grads = [None] * len(tensors)
    for i, found in zip(wanted, torch.autograd.grad(output, [tensors[i] for i in wanted], grad)):
        grads[i] = found
    return grads


def forward(spec, branches):
    if branches.weights[0] is None:
        return norm_relu_select(branches, spec.eps), []
    return cpu.forward(spec, branches)


def put_in_place(monkeypatch):
    """Have the gate take it wherever it would take the GPU's engine for a tensor on a GPU."""
    engine = SimpleNamespace(
        NAME='triton',
        INTERPRETS=False,
        MAX_BRANCHES=gpu.MAX_BRANCHES,
        kernels=True,
        forward=forward,
        backward=cpu.backward,
        norm_act=norm_act,
        norm_act_backward=norm_act_backward,
    )
    monkeypatch.setattr(gate, 'gpu', engine)
    monkeypatch.setattr(gate, '_stubbed', True)
