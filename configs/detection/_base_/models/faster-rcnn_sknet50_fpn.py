_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'
custom_imports = dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)

# The weights' mean, std and RGB order are the base's already; its bilinear resize is one of the two timm trains with.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SKNet',
        depth=50,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:timm/skresnext50_32x4d.ra_in1k'),
    ),
)
