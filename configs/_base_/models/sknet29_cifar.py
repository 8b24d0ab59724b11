# SKNet-29 16x32d for 32x32 images; plain cross-entropy, as ResNeXt's recipe has it.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='SKNet', depth=29, out_indices=(2,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=1024,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
