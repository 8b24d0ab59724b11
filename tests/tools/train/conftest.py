"""tools/train.py up to its first step."""

import pytest


@pytest.fixture
def merged(load_tool):
    """``merged(*words)``: the config as the runner gets it."""
    tool = load_tool('train')

    def merge(*words):
        args = tool.parse_args(list(words))
        return tool.merge_args(tool.load_config(args), args)

    return merge


@pytest.fixture(scope='module')
def build(load_tool, tmp_path_factory):
    """``build(config, *words)``: the runner of tools/train.py, with its optimizer."""
    tool = load_tool('train')

    def build_runner(config, *words):
        args = tool.parse_args([config, '--work-dir', str(tmp_path_factory.mktemp('build')), *words])
        cfg = tool.merge_args(tool.load_config(args), args)
        cfg.experiment_name = cfg.work_dir
        runner = tool.build_runner(cfg)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        return runner

    return build_runner
