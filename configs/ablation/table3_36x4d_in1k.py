_base_ = '../resnext50_32x4d_in1k.py'

model = dict(backbone=dict(cardinality=36))
