# Table 4.
_base_ = [
    '_base_/models/shufflenetv2_in1k.py',
    '_base_/datasets/imagenet_bs128_mild.py',
    '_base_/schedules/imagenet_bs1024_linear.py',
    '_base_/default_runtime.py',
]
