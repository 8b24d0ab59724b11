"""tools/draw_predictions.py: what it draws of detections and of segmentations, and a segmentor from its checkpoint."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmpretrain')

from matplotlib.colors import to_rgb
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from sk_plugins.weights import CheckpointError

CONFIG = 'deeplabv3plus_sknet20-d16_2e_scenes-128x128'
META = dict(classes=('cat', 'dog', 'cow'), palette=[[0, 0, 255], [255, 0, 0], [0, 255, 0]])


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('draw_predictions')


@pytest.fixture
def picture(tmp_path):
    """A file of 40 x 60 pixels."""
    path = tmp_path / 'picture.png'
    Image.fromarray(np.full((40, 60, 3), 90, dtype=np.uint8)).save(path)
    return str(path)


def test_boxes(tool, picture):
    info = dict(img_path=picture, instances=[dict(bbox=[5, 6, 20, 30], bbox_label=1)])
    found = InstanceData(
        bboxes=torch.tensor([[4.0, 6, 21, 29], [30, 10, 50, 35], [0, 0, 9, 9]]),
        scores=torch.tensor([0.875, 0.4, 0.29]),
        labels=torch.tensor([1, 2, 0]),
    )
    figure = tool.draw([info] * 3, [BaseDataElement(pred_instances=found)] * 3, META, columns=2)
    assert len(figure.axes) == 4
    for axis in figure.axes[:3]:
        assert np.array_equal(axis.images[0].get_array(), np.asarray(Image.open(picture)))
        truth, *boxes = axis.patches
        assert [(*p.get_xy(), p.get_width(), p.get_height()) for p in axis.patches] == [
            (5, 6, 15, 24),
            (30, 10, 20, 25),
            (4, 6, 17, 23),
        ]
        assert truth.get_linestyle() == '--'
        assert truth.get_edgecolor()[:3] == to_rgb('red')
        assert [p.get_edgecolor()[:3] for p in boxes] == [to_rgb('lime'), to_rgb('red')]
        assert [text.get_text() for text in axis.texts] == ['cow 40%', 'dog 88%']  # the surest on top
    assert not figure.axes[3].images
    # Another threshold.
    (axis,) = tool.draw([info], [BaseDataElement(pred_instances=found)], META, threshold=0.9).axes
    assert len(axis.patches) == 1


def test_segmentation(tool, picture):
    truth, found = np.zeros((2, 1, 40, 60), dtype=np.int64)
    truth[0, :10], found[0, :, 30:], truth[0, 39, 59] = 1, 2, 255
    sample = BaseDataElement(
        gt_sem_seg=PixelData(data=torch.from_numpy(truth)), pred_sem_seg=PixelData(data=torch.from_numpy(found))
    )
    figure = tool.draw([dict(img_path=picture)] * 2, [sample] * 2, META)
    assert len(figure.axes) == 6
    palette = np.array([*META['palette'], [255, 255, 255]])
    for row, classes in ((1, np.where(truth == 255, 3, truth)), (2, found)):
        for axis in figure.axes[2 * row : 2 * row + 2]:
            assert np.array_equal(axis.images[0].get_array(), palette[classes[0]])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(META['classes'])
    # Without labels.
    del sample.gt_sem_seg
    figure = tool.draw([dict(img_path=picture)], [sample], META)
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['cat', 'cow']


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """Three pictures and label maps where the config's test set lies, in the current directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for kind, shape, suffix in (('images', (128, 128, 3), '.jpg'), ('kinds', (128, 128), '.png')):
        folder = tmp_path / 'data/scenes' / kind / 'val'
        folder.mkdir(parents=True)
        for i in range(3):
            values = rng.integers(0, 6 if kind == 'kinds' else 256, shape, dtype=np.uint8)
            Image.fromarray(values).save(folder / f'{i:06d}{suffix}')
    return tmp_path


@pytest.fixture
def segmentor(load_tool, scenes):
    """The config's segmentor in a file of weights."""
    pytest.importorskip('mmseg')
    parser = argparse.ArgumentParser()
    load_tool('_common').add_common_arguments(parser)
    cfg = load_tool('_common').load_config(parser.parse_args([CONFIG]))
    cfg.experiment_name = 'draw_predictions'
    runner = Runner.from_cfg(cfg)
    torch.save(dict(state_dict=runner.model.state_dict(), meta={}), 'weights.pth')
    return runner.model


def test_command(tool, scenes, segmentor, capsys):
    tool.main([CONFIG, 'weights.pth', 'drawn.png', '--count', '2'])
    assert capsys.readouterr().out.splitlines()[-1] == 'drawn: drawn.png'
    assert Image.open('drawn.png').size[0] > 300
    tool.main([CONFIG, 'weights.pth', 'all.png'])  # the default, 12, of three
    assert Image.open('all.png').size[0] > Image.open('drawn.png').size[0]
    segmentor.eval()
    cfg = tool.load_config(argparse.Namespace(config=CONFIG, cfg_options=None, launcher='none', work_dir=None))
    infos, samples, meta = tool.predict(cfg, 'weights.pth', 2)
    assert [info['img_path'][-10:] for info in infos] == ['000000.jpg', '000001.jpg']
    assert len(meta['classes']) == len(meta['palette']) == 6
    for info, sample in zip(infos, samples):
        image = np.asarray(Image.open(info['img_path']))[..., ::-1].transpose(2, 0, 1).copy()
        data = segmentor.data_preprocessor(dict(inputs=[torch.from_numpy(image)]))
        with torch.inference_mode():
            expected = segmentor.encode_decode(data['inputs'], [sample.metainfo]).argmax(1)
        assert torch.equal(sample.pred_sem_seg.data, expected)
        truth = np.asarray(Image.open(info['seg_map_path']))
        assert np.array_equal(sample.gt_sem_seg.data.squeeze(0), truth)


def test_wrong_weights(tool, scenes, segmentor):
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth'):
        tool.main([CONFIG, 'nowhere.pth', 'drawn.png'])
    torch.save(dict(state_dict={'fc.weight': torch.zeros(1)}, meta={}), 'other.pth')
    with pytest.raises(CheckpointError, match=r'other\.pth: its weights do not fit the model: Missing key'):
        tool.main([CONFIG, 'other.pth', 'drawn.png'])
    assert not (scenes / 'drawn.png').exists()


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['drawn.png', '--count', '0'], 'argument --count: 0 must be at least 1'),
        (['drawn.png', '--amp'], '--amp and --launcher are for training and testing'),
        (['drawn.png', '--threshold', '30'], 'argument --threshold: 30.0 must be from 0 to 1'),
        (['drawn.bmp'], 'argument picture: drawn.bmp must end in one of .'),
        (['nowhere/drawn.png'], 'argument picture: nowhere is no folder'),
    ],
)
def test_wrong_arguments(tool, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        tool.main([CONFIG, 'weights.pth', *words])
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
