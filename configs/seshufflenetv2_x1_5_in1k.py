_base_ = './skshufflenetv2_x1_0_in1k.py'

model = dict(backbone=dict(widen_factor=1.5, unit='se'))
