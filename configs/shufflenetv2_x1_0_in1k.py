_base_ = './skshufflenetv2_x1_0_in1k.py'

model = dict(backbone=dict(unit='plain'))
