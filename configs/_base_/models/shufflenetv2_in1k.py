# ShuffleNetV2 1x with SK units; label smoothing 0.1.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='SKShuffleNetV2', widen_factor=1.0, unit='sk', out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1024,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        topk=(1, 5),
    ),
)

# For several GPUs: sync_bn = 'torch'
