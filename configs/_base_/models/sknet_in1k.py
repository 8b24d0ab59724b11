# Label smoothing 0.1; the backbone and the head initialise as the paper says (He; N(0, 0.01) for attention and head).
model = dict(
    type='ImageClassifier',
    backbone=dict(type='SKNet', depth=50, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        topk=(1, 5),
    ),
)

# For several GPUs: sync_bn = 'torch'
