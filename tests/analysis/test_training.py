"""The attention in numbers while a network trains: by hand, in a plain loop, and in mmengine."""

import json
import math

import pytest
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from torch import nn

from sk_plugins import SelectiveKernel, SKResNet
from sk_plugins.analysis import attention_scalars, log_attention, record

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**kwargs):
    torch.manual_seed(0)
    return randomise(SKResNet((1, 2, 1), channels=(16, 16, 16), cardinality=4, base_width=16, num_classes=3, **kwargs))


def unit(logits):
    """One unit whose attention is the softmax of these logits for every image and channel."""
    kernels = (3, 5, 7)[: len(logits)]
    layer = SelectiveKernel(32, kernel_sizes=kernels, select_bias=True)
    with torch.no_grad():
        layer.attn.fc_select.weight.zero_()
        layer.attn.fc_select.bias.copy_(torch.tensor(logits).repeat_interleave(32))
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ('logits', 'means', 'entropy'),
    [
        ([0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], math.log(3)),
        ([-100.0, 100.0], [0.0, 1.0], 0.0),
        ([math.log(3), 0.0], [0.75, 0.25], -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
    ],
)
def test_scalars_by_hand(logits, means, entropy):
    model = unit(logits)
    with record(model) as attention:
        assert attention_scalars(attention) == {}
        model(torch.randn(2, 32, 8, 8))
    scalars = attention_scalars(attention)
    labels = ['3x3', '5x5', '7x7'][: len(logits)]
    assert list(scalars) == [f'attention/0/{label}' for label in (*labels, 'entropy')]
    assert_close(list(scalars.values()), [*means, entropy], length=3, dtype=torch.float32, scale=1.0)
    assert next(iter(attention_scalars(attention, prefix='a.'))) == 'a.0/3x3'


def steps(model, number, evaluate=True):
    for _ in range(number):
        model.train()
        model(X).sum().backward()
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(X)


def test_log_to_a_file_in_a_plain_loop(tmp_path):
    path = tmp_path / 'run' / 'attention.jsonl'
    model = small()
    log = log_attention(model, path, interval=2)
    assert path.read_text(encoding='utf-8') == ''
    steps(model, 5)
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    assert [row['step'] for row in rows] == [2, 4]
    twin = small().train()
    twin(X)
    with record(twin) as attention:
        twin(X)
    assert rows[0] == {'step': 2, **attention_scalars(attention)}
    assert len(rows[0]) == 1 + 3 * 4
    log.remove()
    steps(model, 2)
    assert log.step == 5
    assert len(path.read_text(encoding='utf-8').splitlines()) == 2
    assert not model._forward_hooks
    assert not model._forward_pre_hooks

    written = []
    log_attention(
        model, lambda scalars, step: written.append((step, list(scalars))), interval=10, start=9, units=['SK_2_1']
    )
    steps(model, 1)
    assert written == [(10, ['attention/SK_2_1/3x3', 'attention/SK_2_1/5x5', 'attention/SK_2_1/entropy'])]


def test_log_of_a_step_that_fails():
    written = []
    model = small().train()
    log_attention(model, lambda scalars, step: written.append(step), interval=1)
    with pytest.raises(RuntimeError, match='channels'):
        model(X[:, :2])
    model(X)
    assert written == [2]


@pytest.mark.slow
def test_log_of_a_compiled_model():
    written = []
    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    log_attention(compiled, lambda scalars, step: written.append((step, scalars)), interval=2)
    steps(compiled, 4, evaluate=False)
    assert [step for step, _ in written] == [2, 4]
    twin = small().train()
    twin(X)
    with record(twin) as attention:
        twin(X)
    assert_close(written[0][1], attention_scalars(attention), length=model, dtype=torch.float32, scale=1.0)
    model.compile()
    with pytest.raises(ValueError, match=r'model was compiled in place by model\.compile\(\)'):
        log_attention(model, written.append)


def test_log_to_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = small()
    writer, written = SummaryWriter(tmp_path), []
    log_attention(model, writer, interval=2, units=['SK_2_1'])
    log_attention(model, lambda scalars, step: written.append(scalars), interval=2, units=['SK_2_1'])
    steps(model, 4)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()['scalars']) == sorted(written[0])
    for name in written[0]:
        assert [event.step for event in events.Scalars(name)] == [2, 4]
        values = [event.value for event in events.Scalars(name)]
        assert_close(values, [row[name] for row in written], dtype=torch.float32)  # as TensorBoard keeps them


def test_bad_arguments(tmp_path):
    model = small()
    for interval in (0, 2.5):
        with pytest.raises(ValueError, match=f'interval={interval} must be an integer of at least 1'):
            log_attention(model, tmp_path / 'a', interval=interval)
    with pytest.raises(ValueError, match='out=3 must be a SummaryWriter, the path of a file, or a function'):
        log_attention(model, 3)
    with pytest.raises(ValueError, match="units has 'SK_7_1', a unit that does not exist"):
        log_attention(model, tmp_path / 'a', units=['SK_7_1'])
    with pytest.raises(ValueError, match='model is a Linear without SK units'):
        log_attention(nn.Linear(2, 2), tmp_path / 'a')
    assert list(tmp_path.iterdir()) == []
    assert not model._forward_hooks
