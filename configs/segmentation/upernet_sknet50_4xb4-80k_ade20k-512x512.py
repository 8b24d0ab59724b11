_base_ = ['_base_/upernet_sknet50.py', '_base_/ade20k_80k.py']

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
