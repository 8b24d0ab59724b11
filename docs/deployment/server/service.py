"""Images over HTTP to the probabilities of their classes; requests that come together are computed together.

MODEL=flowers.onnx bentoml serve service:Classifier
"""

import json
import os

import bentoml
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MODEL = os.environ.get('MODEL', 'model.onnx')  # of `sk-plugins export ... onnx model.onnx --preprocess`
THREADS = int(os.environ.get('THREADS', '2'))


def open_model() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(MODEL, options, providers=['CPUExecutionProvider'])


@bentoml.service(workers=1)
class Network:
    def __init__(self) -> None:
        self.session = open_model()

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=10_000)
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """(batch, height, width, 3) uint8 RGB to (batch, classes)."""
        (logits,) = self.session.run(None, {'image': images})
        exp = np.exp(logits - logits.max(1, keepdims=True))
        return exp / exp.sum(1, keepdims=True)


@bentoml.service(workers=1)
class Classifier:
    network = bentoml.depends(Network)

    def __init__(self) -> None:
        metadata = open_model().get_modelmeta().custom_metadata_map
        self.size = json.loads(metadata['input_size'])[2], json.loads(metadata['input_size'])[1]
        self.crop = float(metadata.get('crop_pct', 1))
        self.labels = json.loads(metadata['labels'])

    def prepare(self, image: Image.Image) -> np.ndarray:
        """What timm's evaluation does: the shorter side to size / crop_pct, the middle of it."""
        image = ImageOps.exif_transpose(image).convert('RGB')
        scale = max(side / own for side, own in zip(self.size, image.size)) / self.crop
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((own - side) // 2 for side, own in zip(self.size, image.size))
        return np.asarray(image.crop((left, top, left + self.size[0], top + self.size[1])))

    @bentoml.api
    async def classify(self, image: Image.Image) -> dict[str, float]:
        """The classes of an image, the likeliest first."""
        (found,) = await self.network.to_async.probabilities(self.prepare(image)[None])
        order = np.argsort(-found)[:5]
        return {self.labels[i]: round(float(found[i]), 4) for i in order}
