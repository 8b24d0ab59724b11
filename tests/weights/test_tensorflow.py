"""The arithmetic of SimCLRv2's networks, and their checkpoints, by TensorFlow itself."""

import numpy as np
import pytest
import torch
from helpers.simclr import LAYERS, Variables, make_image, make_lightly
from torch.nn import functional as F

from sk_plugins.networks.simclr import PaddedAvgPool2d, SameMaxPool2d, preprocess
from sk_plugins.weights import load_third_party, tensorflow

pytestmark = pytest.mark.slow
tf = pytest.importorskip('tensorflow')

SIZES = [(8, 8), (9, 9), (8, 13), (15, 6), (112, 112), (113, 57)]
each_size = pytest.mark.parametrize('size', SIZES, ids=str)


def to_tf(x):
    return tf.constant(x.permute(0, 2, 3, 1).numpy())


def from_tf(x):
    return torch.from_numpy(np.ascontiguousarray(x.numpy())).permute(0, 3, 1, 2)


def pad(x, before, after):
    """``fixed_padding``."""
    return tf.pad(x, [[0, 0], [before, after], [before, after], [0, 0]])


def conv(x, kernel, stride=1):
    """``conv2d_fixed_padding``."""
    if stride > 1:
        x = pad(x, (kernel.shape[0] - 1) // 2, kernel.shape[0] - 1 - (kernel.shape[0] - 1) // 2)
    return tf.nn.conv2d(x, kernel, stride, 'SAME' if stride == 1 else 'VALID')


def shortcut_pool(x, stride):
    """``bottleneck_block``'s."""
    if stride > 1:
        x = pad(x, 0, 1)
    return tf.nn.avg_pool2d(x, 2, stride, 'SAME' if stride == 1 else 'VALID')


def assert_equal(output, expected):
    assert output.shape == expected.shape
    assert (output - expected).abs().max() <= 1e-12 * expected.abs().max()


@each_size
def test_max_pool(size):
    x = make_image(*size) - 0.5
    assert torch.equal(SameMaxPool2d()(x), from_tf(tf.nn.max_pool2d(to_tf(x), 3, 2, 'SAME')))


@pytest.mark.parametrize(('stride', 'mode'), [(1, 'replicate'), (2, 'constant')])
@each_size
def test_avg_pool(size, stride, mode):
    x = make_image(*size) - 0.5
    assert_equal(PaddedAvgPool2d(stride, mode)(x), from_tf(shortcut_pool(to_tf(x), stride)))


@pytest.mark.parametrize('stride', [1, 2])
@each_size
def test_convolution(size, stride):
    x, weight = make_image(*size), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    expected = from_tf(conv(to_tf(x), tf.constant(weight.permute(2, 3, 1, 0).numpy()), stride))
    assert_equal(F.conv2d(x, weight, stride=stride, padding=1), expected)


@pytest.mark.parametrize('size', [(300, 400), (255, 256), (100, 90), (333, 500)], ids=str)
def test_preprocessing(size):
    """``center_crop`` and ``preprocess_for_eval``, down and up."""
    image = (make_image(*size)[0] * 255).byte()
    x = tf.image.convert_image_dtype(image.permute(1, 2, 0).numpy(), tf.float32)
    height, width = size
    side = int(tf.math.rint(tf.constant(0.875) * min(size)))
    x = tf.image.crop_to_bounding_box(x, (height - side + 1) // 2, (width - side + 1) // 2, side, side)
    x = tf.clip_by_value(tf.compat.v1.image.resize_bicubic(x[None], [224, 224])[0], 0.0, 1.0)
    output = preprocess(image)
    assert output.shape == (3, 224, 224)
    assert (output - torch.from_numpy(x.numpy()).permute(2, 0, 1)).abs().max() < 2e-6


def run(variables, x, projection):
    """The network of ``resnet.py`` in TensorFlow, whose layers take their variables in the order they are created."""
    values = {name: tf.constant(tensor.numpy()) for name, tensor in variables.items()}
    numbers = dict(conv2d=0, batch_normalization=0)

    def layer(kind):
        number = numbers[kind]
        numbers[kind] += 1
        return f'base_model/{kind}_{number}' if number else f'base_model/{kind}'

    def norm(x, name=None):
        name = name or layer('batch_normalization')
        leaves = [values[f'{name}/{leaf}'] for leaf in ('moving_mean', 'moving_variance', 'beta', 'gamma')]
        return tf.nn.batch_normalization(x, *leaves, 1e-5)

    def convolve(x, stride=1):
        return conv(x, values[layer('conv2d') + '/kernel'], stride)

    for stride in (2, 1, 1):
        x = tf.nn.relu(norm(convolve(x, stride)))
    x = tf.nn.max_pool2d(x, 3, 2, 'SAME')
    for stage, units in enumerate(LAYERS):
        for unit in range(units):
            stride = 2 if stage and not unit else 1
            shortcut = x if unit else norm(convolve(shortcut_pool(x, stride)))
            x = tf.nn.relu(norm(convolve(x)))
            u = tf.stack(tf.split(tf.nn.relu(norm(convolve(x, stride))), 2, axis=3))
            z = tf.reduce_mean(tf.reduce_sum(u, axis=0), [1, 2], keepdims=True)
            z = tf.nn.relu(norm(convolve(z)))
            mixing = tf.nn.softmax(tf.stack(tf.split(convolve(z), 2, axis=3)), axis=0)
            x = tf.nn.relu(norm(convolve(tf.reduce_sum(u * mixing, axis=0))) + shortcut)
    x = tf.reduce_mean(x, [1, 2])
    for i in range(projection):
        scope = f'head_contrastive/nl_{i}'
        x = tf.nn.relu(norm(x @ values[f'{scope}/dense/kernel'], f'{scope}/batch_normalization'))
    return x @ values['head_supervised/linear_layer/dense/kernel'] + values['head_supervised/linear_layer/dense/bias']


def save(variables, path):
    """As TensorFlow 1 saves them."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        kept = [
            tf.compat.v1.get_variable(name, initializer=tensor.numpy(), use_resource=False)
            for name, tensor in variables.items()
        ]
        session.run(tf.compat.v1.global_variables_initializer())
        return tf.compat.v1.train.Saver(kept).save(session, str(path), global_step=250228)


@pytest.mark.parametrize('projection', [0, 1])
@torch.no_grad()
def test_checkpoint(tmp_path, projection):
    """Written by TensorFlow, read by it, and run by both."""
    _, weights = make_lightly(projection=2)
    variables = Variables(weights, trained=('base_model', 'head_supervised'))
    path = save(variables, tmp_path / 'model.ckpt')
    assert tensorflow.is_checkpoint(path)
    assert tensorflow.read(path).keys() == variables.keys()
    for source in (path, tmp_path):
        model = load_third_party(source, projection=projection)
        for size in ((64, 64), (65, 50)):
            x = make_image(*size)
            expected = torch.from_numpy(run(variables, to_tf(x), projection).numpy())
            assert_equal(model(x), expected)
