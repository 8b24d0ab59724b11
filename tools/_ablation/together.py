"""Networks of one shape as one module, so that several seeds are trained at once."""

import copy

from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class Alone(nn.Module):
    """One network, with the calls of :class:`Together`: (1, B, ...) to (1, B, classes)."""

    stacked = 0  # dimensions before a parameter's own

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x[0])[None]

    def unstack(self) -> list[nn.Module]:
        return [self.model]


class Together(nn.Module):
    """S networks of one shape: (S, B, ...), the images of each, to (S, B, classes).

    Parameters and buffers have the networks along their first dimension. So they have the gradients, the running
    statistics and, with an optimiser that works value by value, the steps that each network would have alone.
    """

    stacked = 1

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        parameters, buffers = stack_module_state(models)
        # A parameter's name must not have dots.
        self.names = {name.replace('.', '/'): name for name in (*parameters, *buffers)}
        for name, value in parameters.items():
            self.register_parameter(name.replace('.', '/'), nn.Parameter(value.detach()))
        for name, value in buffers.items():
            self.register_buffer(name.replace('.', '/'), value)
        # In a list, since its parameters are none of this module's.
        self.shape = [copy.deepcopy(models[0]).to('meta')]

    def train(self, mode: bool = True) -> 'Together':
        self.shape[0].train(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        states = (
            {self.names[name]: value for name, value in part}
            for part in (self._parameters.items(), self._buffers.items())
        )
        return vmap(lambda *state: functional_call(self.shape[0], state[:2], state[2]))(*states, x)

    def unstack(self) -> list[nn.Module]:
        """The networks, as they are now."""
        state = {self.names[name]: value for name, value in self.state_dict().items()}
        models = []
        for i in range(len(next(iter(state.values())))):
            model = copy.deepcopy(self.shape[0]).to_empty(device=next(self.parameters()).device)
            model.load_state_dict({name: value[i] for name, value in state.items()})
            models.append(model)
        return models
