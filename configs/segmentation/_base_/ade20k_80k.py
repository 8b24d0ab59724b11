# mmsegmentation's own files, by where its package lies: mmengine's `mmseg::` asks for the original distribution's name.
_base_ = [
    f'{__import__("mmseg").__path__[0]}/.mim/configs/_base_/{name}.py'
    for name in ('datasets/ade20k', 'schedules/schedule_80k', 'default_runtime')
]
custom_imports = dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)

sync_bn = 'torch'  # with a launcher: the backbone's norms, too, as the heads' are SyncBN in mmsegmentation's files
auto_scale_lr = dict(base_batch_size=16)  # 4 GPUs x 4 images
