"""Networks as training could leave them, for tests that compare outputs."""

import torch


def randomise(model, seed=0):
    """Weights and statistics that no two layers share, small enough for sane outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var') or (name.endswith('weight') and tensor.ndim == 1):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.75)
            elif tensor.is_floating_point() and tensor.ndim < 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif name.endswith('fc_select.weight'):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()
