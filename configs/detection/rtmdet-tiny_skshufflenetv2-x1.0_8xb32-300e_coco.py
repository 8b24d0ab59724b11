_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
custom_imports = dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)

# No weights of SK-ShuffleNetV2 are published: these are what `tools/train.py configs/skshufflenetv2_x1_0_in1k.py`
# leaves. Others go to model.backbone.init_cfg.checkpoint; they must be there, since stage 1 and every BatchNorm stay as
# they were loaded.
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SKShuffleNetV2',
        widen_factor=1.0,
        out_indices=(0, 1, 2),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/skshufflenetv2_x1_0_in1k/epoch_240.pth'),
    ),
    neck=dict(in_channels=[116, 232, 464]),
)
