"""mmengine's initialisers of this project."""

from typing import Any

from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader
from torch import nn

from ..networks import SKResNet
from ..weights.files import CheckpointError
from ..weights.warm import read_resnet, warm_start

__all__ = ['WarmStart']


@WEIGHT_INITIALIZERS.register_module()
class WarmStart:
    """The weights of a ResNet, ResNeXt or SE-ResNeXt for the SK network of its shape, and its classifier for the head.

    ::

        warm = dict(type='WarmStart', checkpoint='hf-hub:timm/resnext101_32x4d.gluon_in1k')
        model = dict(
            backbone=dict(type='SKNet', depth=101, sk_kwargs=dict(dilated=False), init_cfg=warm),
            head=dict(init_cfg=warm),
        )

    In a backbone's ``init_cfg`` it is :func:`~sk_plugins.weights.warm_start`: with ``dilated=False`` the outputs are
    the ResNet's. In that of a head with a linear layer ``fc`` it loads the ResNet's classifier.

    Args:
        checkpoint: any that mmengine loads, with the names of timm, torchvision or mmpretrain.
        map_location: as in ``torch.load``.

    Raises:
        CheckpointError, HubError: it cannot be had or read, or does not fit.
    """

    def __init__(self, checkpoint: str, map_location: Any = 'cpu') -> None:
        self.checkpoint = checkpoint
        self.map_location = map_location

    def __call__(self, module: nn.Module) -> None:
        loaded = CheckpointLoader.load_checkpoint(self.checkpoint, self.map_location, logger='current')
        weights = loaded.get('state_dict', loaded)
        try:
            if isinstance(module, SKResNet):
                warm_start(module, weights)
            else:
                self._load_classifier(module, weights)
        except CheckpointError as error:
            raise CheckpointError(f'{self.checkpoint}: {str(error).removeprefix("the state dict: ")}') from error
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=f'WarmStart: load from {self.checkpoint}')

    def _load_classifier(self, module: nn.Module, weights: dict[str, Any]) -> None:
        fc = getattr(module, 'fc', None)
        if not isinstance(fc, nn.Linear):
            raise CheckpointError(f'a {type(module).__name__} is no SK network, and has no linear layer fc')
        named = read_resnet(weights)[0]
        given = {name: named[f'fc.{name}'] for name in ('weight', 'bias') if f'fc.{name}' in named}
        shapes, wanted = ({k: tuple(v.shape) for k, v in one.items()} for one in (given, fc.state_dict()))
        if shapes != wanted:
            raise CheckpointError(
                f'its classifier has the shapes {shapes}, and that of this head {wanted}: with other classes, the head '
                'has no use for it (init_cfg=None)'
            )
        fc.load_state_dict(given)
