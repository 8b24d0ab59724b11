"""Time a RetinaNet's training step on SKNet-50 beside the same RetinaNet on timm's network, and count what both keep.

python tools/benchmark_detection.py --threads 2   # `make bench-det` does so, into results/benchmark_detection_cpu.md

The detector is that of configs/detection/retinanet_sknet50_fpn_1x_coco.py. Its backbone is timm's skresnext50_32x4d in
mmpretrain.TIMMBackbone, then SKNet-50 with nothing frozen, as TIMMBackbone has it, then SKNet-50 as the config has it,
with stage 1 and every BatchNorm frozen. Timing, ratios and spread are benchmark.py's. Weights and images are random;
each image of a batch has boxes of its own, the same for every backbone.
"""

import argparse
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from _arguments import Parser
from _benchmark.machine import describe_machine, keep_freed_memory
from _benchmark.measuring import measure
from _benchmark.reporting import make_report, markdown
from _benchmark.settings import MEMORY_FORMATS, Run, Settings
from _errors import run
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn

from sk_plugins._resources import find_config

CONFIG = 'detection/retinanet_sknet50_fpn_1x_coco'
BASELINE = 'TIMMBackbone(skresnext50_32x4d)'
NUM_BOXES = 7  # about as many as COCO's images have
NUM_CLASSES = 80


class Loss(nn.Module):
    """A detector's loss: normalised images (B, 3, H, W) to a scalar."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        samples = [annotate(i, height, width).to(images.device) for i in range(len(images))]
        return self.detector.parse_losses(self.detector(images, samples, mode='loss'))[0]


def annotate(index: int, height: int, width: int) -> Any:
    """mmdet's ``DetDataSample`` of image ``index`` of a batch: boxes of 5 to 40 % of its sides, all within it."""
    from mmdet.structures import DetDataSample

    generator = torch.Generator().manual_seed(index)
    whole = torch.tensor([width, height])
    corner = torch.rand(NUM_BOXES, 2, generator=generator) * 0.6 * whole
    sides = (torch.rand(NUM_BOXES, 2, generator=generator) * 0.35 + 0.05) * whole
    shape = (height, width)
    sample = DetDataSample(metainfo=dict(img_shape=shape, pad_shape=shape, batch_input_shape=shape))
    sample.gt_instances = InstanceData(
        bboxes=torch.cat([corner, corner + sides], dim=1),
        labels=torch.randint(NUM_CLASSES, (NUM_BOXES,), generator=generator),
    )
    return sample


@dataclass(frozen=True)
class Variant:
    """The config's detector on a backbone, as ``measure`` takes it."""

    label: str
    backbone: dict[str, Any] = field(hash=False)
    fuse: ClassVar[bool] = False
    compile: ClassVar[bool] = False
    stub: ClassVar[bool] = False

    def build(self) -> nn.Module:
        from mmdet.registry import MODELS

        cfg = Config.fromfile(find_config(CONFIG)).model
        cfg.backbone = self.backbone
        with DefaultScope.overwrite_default_scope('mmdet'):
            return Loss(MODELS.build(cfg))


def variants() -> list[Variant]:
    """The baseline first."""
    configs = {**Config.fromfile(find_config(CONFIG)).model.backbone, 'init_cfg': None}
    timms = dict(type='mmpretrain.TIMMBackbone', model_name='skresnext50_32x4d', features_only=True)
    return [
        Variant(BASELINE, {**timms, 'out_indices': (1, 2, 3, 4)}),
        Variant('SKNet-50', {**configs, 'frozen_stages': -1, 'norm_eval': False}),
        Variant('SKNet-50, frozen_stages=1, norm_eval', configs),
    ]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='default: cpu')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32', help='bfloat16 is autocast')
    parser.add_argument('--memory-format', choices=MEMORY_FORMATS, default='channels_last')
    parser.add_argument('--batch-size', type=int, default=2, metavar='N', help="default: 2, the recipe's per GPU")
    parser.add_argument('--size', type=int, default=320, metavar='PIXELS', help='side of the images (default: 320)')
    parser.add_argument('--repeats', type=int, default=15, metavar='N', help='default: 15')
    parser.add_argument('--threads', type=int, metavar='N', help="CPU threads (default: torch's)")
    parser.add_argument('--json', type=Path, metavar='FILE', help='write everything measured there')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write the tables there')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = vars(parse_args(argv))
    outputs = {name: args.pop(name) for name in ('json', 'markdown')}
    settings = Settings(**args)
    settings.check()
    if settings.batch_size < 2:
        raise ValueError('--batch-size 1: a training step needs two images or more, for the BatchNorms')
    if importlib.util.find_spec('mmdet') is None:
        raise ValueError('mmdetection is not installed: `make det` makes an environment that has it')
    for path in outputs.values():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(settings.device)
    machine['threads'] = settings.threads or machine['threads']
    results = measure(variants(), Run('train'), settings)
    report = make_report("RetinaNet's training step by its backbone", settings, results, BASELINE, machine)
    text = markdown(report)
    if outputs['json'] is not None:
        outputs['json'].write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')
    if outputs['markdown'] is not None:
        outputs['markdown'].write_text(text, encoding='utf-8')
    print(text, end='')


if __name__ == '__main__':
    keep_freed_memory()
    run(main, OSError, ValueError)
