_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'
custom_imports = dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)

# No weights of SKNet-101 are published: these are what `tools/train.py configs/sknet101_in1k.py` leaves. Others go to
# model.backbone.init_cfg.checkpoint; they must be there, since stage 1 and every BatchNorm stay as they were loaded.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SKNet',
        depth=101,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/sknet101_in1k/epoch_100.pth'),
    ),
)
