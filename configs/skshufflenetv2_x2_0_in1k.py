_base_ = './skshufflenetv2_x1_0_in1k.py'

model = dict(backbone=dict(widen_factor=2.0), head=dict(in_channels=2048))
