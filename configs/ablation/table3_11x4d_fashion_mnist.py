# 1.30M parameters, 60.4 MFLOPs.
_base_ = './table3_resnext_fashion_mnist.py'

model = dict(backbone=dict(cardinality=11))
