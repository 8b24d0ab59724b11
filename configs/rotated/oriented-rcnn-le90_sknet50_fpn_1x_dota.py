# Oriented R-CNN for DOTA, split by mmrotate's tools/data/dota/split into data/split_ss_dota.
_base_ = 'mmrotate::oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py'
custom_imports = dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)

# The weights' mean, std and RGB order are the base's already.
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
