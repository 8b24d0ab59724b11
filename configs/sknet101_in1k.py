_base_ = './sknet50_in1k.py'

model = dict(backbone=dict(depth=101))
