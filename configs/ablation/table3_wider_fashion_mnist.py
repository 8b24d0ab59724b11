# 1.26M parameters, 59.5 MFLOPs.
_base_ = './table3_resnext_fashion_mnist.py'

model = dict(backbone=dict(channels=(18, 36, 72, 144)), head=dict(in_channels=576))
