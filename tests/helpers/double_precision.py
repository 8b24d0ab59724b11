"""For configs of tests: importing this makes networks of float64, and its hook feeds them such images."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

torch.set_default_dtype(torch.float64)


@HOOKS.register_module()
class DoublePrecisionHook(Hook):
    def before_train(self, runner):
        preprocessor = getattr(runner.model, 'module', runner.model).data_preprocessor
        preprocessor.register_forward_hook(lambda module, args, data: {**data, 'inputs': data['inputs'].double()})
