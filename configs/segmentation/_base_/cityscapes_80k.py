_base_ = [
    f'{__import__("mmseg").__path__[0]}/.mim/configs/_base_/{name}.py'  # see ade20k_80k.py
    for name in ('datasets/cityscapes', 'schedules/schedule_80k', 'default_runtime')
]
custom_imports = dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)

sync_bn = 'torch'
auto_scale_lr = dict(base_batch_size=8)  # 4 GPUs x 2 images
