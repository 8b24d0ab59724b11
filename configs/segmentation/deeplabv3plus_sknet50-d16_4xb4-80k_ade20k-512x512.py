_base_ = 'deeplabv3plus_sknet50-d8_4xb4-80k_ade20k-512x512.py'

model = dict(backbone=dict(output_stride=16), decode_head=dict(dilations=(1, 6, 12, 18)))
