"""Images over HTTP to the probabilities of their classes; requests that come together are computed together.

python serve.py flowers.onnx
"""

import argparse
import json
from typing import Any

import litserve
import numpy as np
import onnxruntime
from fastapi import Request
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps


def open_model(path: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    if session.get_modelmeta().custom_metadata_map.get('input') != 'uint8 RGB, NHWC':
        raise ValueError('it takes no uint8 images: export it with --preprocess')
    if isinstance(session.get_inputs()[0].shape[0], int):
        raise ValueError('it is of one batch: export it without --no-dynamic and --batch')
    return session


class Classifier(litserve.LitAPI):
    """The file of ``sk-plugins export ... onnx MODEL --preprocess``, with its own labels, size and crop.

    Args:
        model: the ONNX file.
        threads: that compute.
        kwargs: of ``LitAPI``: ``max_batch_size``, ``batch_timeout`` and others.
    """

    def __init__(self, model: str, threads: int, **kwargs: Any) -> None:
        super().__init__(api_path='/classify', **kwargs)
        self.model, self.threads = model, threads

    def setup(self, device: str) -> None:
        self.session = open_model(self.model, self.threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.size = json.loads(metadata['input_size'])[:0:-1]  # width, height
        self.crop = float(metadata['crop_pct'])
        self.interpolation = Image.Resampling[metadata['interpolation'].upper()]
        numbers = [str(i) for i in range(self.session.get_outputs()[0].shape[1])]
        self.labels = json.loads(metadata['labels']) if 'labels' in metadata else numbers

    def decode_request(self, request: Request) -> np.ndarray | None:
        """A form's field ``image``, a file: the middle that timm's evaluation crops, (height, width, 3) uint8 RGB.

        None for what is no image: an exception would be the answer to every request of its batch.
        """
        try:
            image = ImageOps.exif_transpose(Image.open(request['image'].file)).convert('RGB')
        except Exception:  # Pillow's readers raise of many kinds
            return None
        return np.asarray(ImageOps.fit(image, self.size, self.interpolation, bleed=(1 - self.crop) / 2))

    def batch(self, inputs: list[np.ndarray | None]) -> list[np.ndarray | None]:
        return inputs

    def predict(self, images: Any) -> Any:
        """The probabilities of the classes, for every image: of a list, or of one alone where batches are of one."""
        if not isinstance(images, list):
            return self.predict([images])[0]
        found: list[np.ndarray | None] = [None] * len(images)
        read = [i for i, image in enumerate(images) if image is not None]
        if read:
            (logits,) = self.session.run(None, {'image': np.stack([images[i] for i in read])})
            exp = np.exp(logits - logits.max(1, keepdims=True))
            for i, probabilities in zip(read, exp / exp.sum(1, keepdims=True)):
                found[i] = probabilities
        return found

    def unbatch(self, outputs: list[np.ndarray | None]) -> list[np.ndarray | None]:
        return outputs

    def encode_response(self, output: np.ndarray | None) -> JSONResponse:
        """The five likeliest classes, the likeliest first."""
        if output is None:
            return JSONResponse({'detail': 'image: no image that can be read'}, 400)
        return JSONResponse({self.labels[i]: round(float(output[i]), 4) for i in np.argsort(-output)[:5]})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='an ONNX file')
    parser.add_argument('--threads', type=int, default=2, help='that compute (default: 2)')
    parser.add_argument('--batch', type=int, default=16, help='images computed together at most (default: 16)')
    parser.add_argument(
        '--wait', type=float, default=0.01, help='seconds that an image waits for others (default: 0.01)'
    )
    parser.add_argument('--host', default='127.0.0.1', help='default: 127.0.0.1, this machine alone')
    parser.add_argument('--port', type=int, default=8000, help='default: 8000')
    args = parser.parse_args()
    if min(args.batch, args.threads) < 1 or args.wait < 0:
        parser.error('--batch and --threads are at least 1, --wait is at least 0')
    try:
        open_model(args.model, args.threads)
    except Exception as error:  # of ONNX Runtime's own kinds
        parser.error(f'{args.model}: {error}')
    api = Classifier(args.model, args.threads, max_batch_size=args.batch, batch_timeout=args.wait)
    litserve.LitServer(api, accelerator='cpu').run(host=args.host, port=args.port, generate_client_file=False)
