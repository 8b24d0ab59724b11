_base_ = ['_base_/deeplabv3plus_sknet50-d8.py', '_base_/ade20k_80k.py']

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
