# SKNet-26, a quarter as wide, with a stem for images of some 8 to 32 pixels: 1.3M parameters.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SKNet',
        depth=26,
        in_channels=1,
        channels=(16, 32, 64, 128),
        cardinality=8,
        base_width=16,
        small_stem=True,
        channels_last=True,
        out_indices=(3,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=512,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
