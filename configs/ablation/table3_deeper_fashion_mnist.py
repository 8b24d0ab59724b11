# 1.25M parameters, 57.9 MFLOPs.
_base_ = './table3_resnext_fashion_mnist.py'

model = dict(backbone=dict(layers=(2, 2, 5, 2)))
