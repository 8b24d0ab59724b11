"""`python -m sk_plugins`: the list of tools, at once, and the names that were meant."""

import subprocess
import sys

import pytest

from sk_plugins import __main__ as command
from sk_plugins._resources import ROOT


def run(*words):
    done = subprocess.run([sys.executable, '-X', 'importtime', *words], cwd=ROOT, capture_output=True, text=True)
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines() if line.startswith('import time:')}
    said = '\n'.join(line for line in done.stderr.splitlines() if not line.startswith('import time:'))
    return done.stdout, said, imported


def test_the_list_takes_no_models():
    said, _, imported = run('-m', 'sk_plugins', '--help')
    assert 'sk_plugins._resources' in imported
    assert not {'torch', 'timm', 'numpy'} & imported
    titles = dict(line.strip().split(maxsplit=1) for line in said.splitlines() if line.startswith('  '))
    assert {'finetune', 'predict', 'push', 'train'} <= titles.keys()
    assert titles['predict'] == 'What a model says of pictures: a table, a file of it, and drawings.'


def test_a_mistyped_tool():
    _, said, imported = run('-m', 'sk_plugins', 'trian')
    assert said.splitlines()[-1] == "sk-plugins: error: there is no tool 'trian'; near it is train"
    assert 'torch' not in imported


@pytest.mark.slow
def test_models_are_there_for_a_tool(tmp_path):
    """And for whoever imports the package, also while `python -m` looks for a module that is not ours."""
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools' / 'show.py').write_text(
        '"""Shows."""\nimport sys, sk_plugins, timm\n'
        'print(sys.argv[1:], sk_plugins.SKResNet.__name__, timm.is_model("sknet50"))\n'
    )
    code = (
        'import sys; from pathlib import Path; sys.argv = ["/bin/sk-plugins", "show", "x"]; '
        'from sk_plugins import __main__ as m; import sk_plugins; assert not hasattr(sk_plugins, "SKResNet"); '
        f'm.ROOT = Path({str(tmp_path)!r}); m.main(); '
        'del sys.modules["sk_plugins"]; sys.argv = ["-m"]; import sk_plugins; print(sk_plugins.SKResNet.__name__)'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['x'] SKResNet True\nSKResNet\n"


def test_every_tool_has_a_title():
    for path in (ROOT / 'tools').glob('[a-z]*.py'):
        title = command._title(path)
        assert title[0].isupper(), path
        assert title.endswith(('.', ':')) or 'python' not in title, path


@pytest.mark.parametrize('words', [['--help'], ['-h']])
def test_help(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['sk_plugins', *words])
    command.main()
    assert '\n  finetune ' in capsys.readouterr().out
