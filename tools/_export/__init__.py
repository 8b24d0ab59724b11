"""tools/export.py: networks as files for other runtimes."""

TARGET_NAMES = ('onnx', 'openvino', 'torchscript', 'aoti', 'executorch', 'coreml', 'ncnn', 'litert', 'tensorrt')
# What can be of 8 bits, and the packages that this needs beside the target's own.
INT8 = {
    'onnx': ('onnxruntime',),
    'openvino': ('nncf',),
    'aoti': ('torchao',),
    'executorch': ('torchao',),
    'litert': ('ai_edge_quantizer',),
}
# What of a file of 8 bits cannot stay open, though it can in float: Inductor lays the weights out for one batch, and
# for another it would do so again at every call.
FIXED_IN_INT8 = {'aoti': frozenset({'batch'})}
