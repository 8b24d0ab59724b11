"""results/scenes, shortened to an epoch or two, and floors that only a network that sees can reach."""

import importlib.util
import json

import pytest

pytest.importorskip('mmpretrain')
pytest.importorskip('skimage')
pytest.importorskip('pycocotools')

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def needs(framework):
    missing = importlib.util.find_spec(framework) is None
    return pytest.mark.skipif(missing, reason=f'needs {framework}')


@pytest.fixture(scope='module')
def folder(load_tool, python_tool, tmp_path_factory):
    """A folder with the scenes, and the classifiers that the configs start from."""
    debian = load_tool('prepare_fashion_mnist').DEBIAN
    if not debian.is_dir():
        pytest.skip(f'no Fashion-MNIST in {debian}: install the package dataset-fashion-mnist')
    folder = tmp_path_factory.mktemp('scenes')
    python_tool('prepare_fashion_mnist', cwd=folder)
    python_tool('prepare_scenes', cwd=folder)
    python_tool('train', 'sknet20_fashion_mnist', cwd=folder)
    python_tool('train', 'sknet20_scenes', '--no-validate', cwd=folder)
    return folder


@pytest.mark.parametrize(
    ('config', 'epochs', 'metric', 'floor'),
    [
        pytest.param('retinanet_sknet20_fpn_8e_scenes-128x128', 2, 'coco/bbox_mAP_50', 0.3, marks=needs('mmdet')),
        pytest.param('deeplabv3plus_sknet20-d16_2e_scenes-128x128', 1, 'mIoU', 50, marks=needs('mmseg')),
    ],
)
def test_held_out_scenes(python_tool, folder, config, epochs, metric, floor):
    options = [f'train_cfg.max_epochs={epochs}', f'param_scheduler.1.end={epochs}']
    python_tool('train', config, '--no-validate', '--cfg-options', *options, cwd=folder)
    checkpoint = (folder / 'work_dirs' / config / 'last_checkpoint').read_text()
    python_tool('test', config, checkpoint, '--out', 'metrics.json', cwd=folder)
    assert json.loads((folder / 'metrics.json').read_text())[metric] >= floor
