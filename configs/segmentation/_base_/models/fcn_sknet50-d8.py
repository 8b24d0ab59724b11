# By its path: see ../default_runtime.py.
_base_ = f'{__import__("mmseg").__path__[0]}/.mim/configs/_base_/models/fcn_r50-d8.py'

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SKNet',
        depth=50,
        out_indices=(0, 1, 2, 3),
        output_stride=8,
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:timm/skresnext50_32x4d.ra_in1k'),
    ),
)
