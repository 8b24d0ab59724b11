# ResNeXt-50, what SKNet-50 is compared with (Table 2).
_base_ = './sknet50_in1k.py'

model = dict(backbone=dict(unit='plain'))
