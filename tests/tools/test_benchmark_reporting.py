"""_benchmark.reporting: medians and ratios by hand, and the tables of a report, a GPU's too."""

import json

import pytest
from _benchmark.measuring import Result
from _benchmark.reporting import Ratio, make_report, markdown, ratio, summarise
from _benchmark.sets import Figure, Set
from _benchmark.settings import Run, Settings


def test_median_and_spread():
    found = summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert found.spread == pytest.approx(100 * 2 / 3)
    assert summarise([2.0]) == Ratio(2.0)
    assert summarise([2.0]).spread is None


def test_ratios_are_taken_within_a_repeat():
    # The machine is twice as slow in the second repeat and ten times in the third: the ratio is 0.5 all the same.
    ours = Result(Run('infer'), 'ours', [1.0, 2.0, 10.0, 0.6])
    theirs = Result(Run('infer'), 'theirs', [2.0, 4.0, 20.0, 1.0])
    found = ratio(ours, theirs)
    assert (found.median, found.low, found.high) == (0.5, 0.5, pytest.approx(0.525))
    assert found.spread == pytest.approx(5)
    assert ratio(ours, None) is None


def test_ratios_of_memory():
    ours = Result(Run('train'), 'ours', saved_mib=120.0)
    assert ratio(ours, Result(Run('train'), 'theirs', saved_mib=160.0), 'saved_mib') == Ratio(0.75)
    assert ratio(ours, Result(Run('train'), 'theirs', peak_mib=160.0), 'peak_mib') is None


def test_titles_of_runs():
    assert Run('infer').title == 'inference'
    assert Run('train', batch_size=2, size=32, threads=1).title == 'training step, batch 2, 32 x 32, 1 thread'
    assert Run('infer', threads=2).title == 'inference, 2 threads'


GPU = dict(
    date='2026-01-02T03:04:05+00:00',
    cpu='A CPU',
    cpu_capability='AVX2',
    cores=16,
    threads=8,
    gpu='A GPU, 80 GiB',
    python='3.12.1',
    torch='2.11.0',
    timm='1.0.31',
    torchvision=None,
)


@pytest.fixture
def report():
    """Two models on a GPU, the first of which cannot be captured."""
    settings = Settings('cuda', 'bfloat16', batch_size=128, repeats=3)
    train, small = Run('train'), Run('train', batch_size=4, size=64)
    ours = Result(
        train,
        'ours',
        samples=[0.04, 0.05, 0.06],
        host_samples=[0.03, 0.03, 0.03],
        peak_mib=800.0,
        python_calls=2000,
        operator_calls=900,
        launches=1200,
        kernel_seconds=0.035,
        graph_error='operation not permitted',
        first_step_seconds=5.0,
        ways={'triton': 15, 'plain': 1},
    )
    theirs = Result(
        train,
        'theirs',
        samples=[0.08, 0.1, 0.12],
        host_samples=[0.02, 0.02, 0.02],
        peak_mib=1000.0,
        python_calls=1000,
        operator_calls=450,
        launches=600,
        kernel_seconds=0.07,
        graph_seconds=0.0789,
        first_step_seconds=1.0,
    )
    hosts = [Result(small, 'ours', [0.02] * 3, [0.012] * 3), Result(small, 'theirs', [0.01] * 3, [0.01] * 3)]
    figures = (
        Figure('training step', 'train', 'seconds', 'ours', (('theirs', 0.45),)),
        Figure("host's time", 'train', 'host_seconds', 'ours', (('theirs', 1.2),), batch_size=4, size=64),
        Figure('launches', 'train', 'launches', 'ours', (('theirs', None),)),
        Figure('graph', 'train', 'graph_seconds', 'ours', (('theirs', None),)),
    )
    chosen = Set('On a GPU', settings, 'theirs', ('theirs = 1',), figures)
    return make_report(chosen.title, settings, [ours, theirs, *hosts], 'theirs', GPU, chosen)


def test_report_of_a_gpu(report):
    assert markdown(report) == (
        '# On a GPU\n\n'
        '|  | theirs = 1 |\n'
        '| --- | --- |\n'
        '| training step | **0.500** (spread 0.0 %, goal 0.45: missed) |\n'
        "| host's time | **1.200** (spread 0.0 %, goal 1.20: met) |\n"
        '| launches | **2.000** |\n'
        '| graph | not available |\n\n'
        'Batch 128, 224 x 224, bfloat16 autocast, channels_last; medians of 3 interleaved repeats, ratios taken within '
        'each repeat; spread: interquartile range by median; bytes saved: tensors that autograd keeps of one image, by '
        'storage, parameters and buffers left out; Python calls and operator calls: of a forward pass, in training '
        "with the loss and the backward pass, without the optimizer's and without those that operators make themselves"
        "; way: how many SK units took which; host: until the step's Python returns, begun with an idle GPU. "
        'Measured on: A GPU, 80 GiB, A CPU (AVX2), 16 cores, 8 threads, Python 3.12.1, torch 2.11.0, timm 1.0.31, '
        '2026-01-02.\n\n'
        '## Training step\n\n'
        '| model | ms per step | spread | images/s | time, `theirs` = 1 | peak, MiB | peak, `theirs` = 1 |\n'
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n'
        '| `ours` | 50.0 | 20.0 % | 2560.0 | 0.500 (spread 0.0 %) | 800.0 | 0.800 |\n'
        '| `theirs` | 100.0 | 20.0 % | 1280.0 | 1 | 1000.0 | 1 |\n\n'
        "The host's part, in brackets `theirs` = 1:\n\n"
        '| model | way | first step, s | Python calls | operator calls | host, ms | kernel launches | kernels, ms '
        '| CUDA graph, ms |\n'
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n'
        '| `ours` | triton 15, plain 1 | 5.00 | 2,000 (2.00) | 900 (2.00) | 30.00 (1.50) | 1,200 (2.00) | 35.00 (0.50) '
        '| not possible |\n'
        '| `theirs` |  | 1.00 | 1,000 (1.00) | 450 (1.00) | 20.00 (1.00) | 600 (1.00) | 70.00 (1.00) '
        '| 78.90 (1.00) |\n\n'
        '- CUDA graph not possible (operation not permitted): `ours`.\n\n'
        '## Training step, batch 4, 64 x 64\n\n'
        '| model | ms per step | spread | images/s | time, `theirs` = 1 |\n'
        '| --- | ---: | ---: | ---: | ---: |\n'
        '| `ours` | 20.0 | 0.0 % | 200.0 | 2.000 (spread 0.0 %) |\n'
        '| `theirs` | 10.0 | 0.0 % | 400.0 | 1 |\n\n'
        "The host's part, in brackets `theirs` = 1:\n\n"
        '| model | host, ms |\n'
        '| --- | ---: |\n'
        '| `ours` | 12.00 (1.20) |\n'
        '| `theirs` | 10.00 (1.00) |\n'
    )


def test_a_report_is_json(report):
    again = json.loads(json.dumps(report))
    assert again == report
    assert markdown(again) == markdown(report)
