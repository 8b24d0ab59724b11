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
