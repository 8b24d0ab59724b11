"""tools/export.py: networks as files for other runtimes."""

TARGET_NAMES = ('onnx', 'openvino', 'torchscript', 'aoti', 'executorch', 'coreml', 'ncnn', 'litert', 'tensorrt')
