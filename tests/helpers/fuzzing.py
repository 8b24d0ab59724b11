"""How hard the tests in ``fuzz/`` search, and what they share.

``HYPOTHESIS_PROFILE=thorough`` draws some ``FUZZ_EXAMPLES`` settings a test (500 where it isn't set), anew in every
run; otherwise it is the same few in every run.
"""

import os
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

THOROUGH = os.environ.get('HYPOTHESIS_PROFILE') == 'thorough'
TALLY = Counter()

_common = dict(database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.register_profile('quick', derandomize=True, **_common)
settings.register_profile('thorough', **_common)
settings.load_profile('thorough' if THOROUGH else 'quick')


def fuzz(quick, share=1.0):
    """Settings for a test: ``quick`` examples, or ``share`` of the thorough run's."""
    examples = int(share * int(os.environ.get('FUZZ_EXAMPLES', 500)))
    return settings(max_examples=examples if THOROUGH else quick)


def tally(what):
    """Count an outcome; a thorough run prints the counts at its end."""
    TALLY[what] += 1


# What users put where a number, a name or a flag belongs.
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([0, -1, 2**20 + 1, 2**31, 2**63, 10**30]),
    st.floats(-4, 40),
    st.sampled_from([float('nan'), float('inf')]),
    st.text(max_size=4),
    st.lists(st.integers(-1, 8), max_size=4),
    st.tuples(st.integers(0, 8), st.integers(0, 8)),
    st.dictionaries(st.text(max_size=3), st.integers(0, 4), max_size=2),
    st.sampled_from([b'3', {3}, object, len]),
)


def assert_named(error, arguments):
    """An error's message names one of the arguments together with its value, or with a part of it."""
    said = str(error)

    def values(value):
        yield value
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for part in value:
                yield from values(part)

    named = [name for name in arguments if name in said]
    assert any(repr(value) in said for name in named for value in values(arguments[name])), (
        f'{said} names no argument of {arguments} with its value'
    )


def resolved(args):
    """(kernel, dilation, groups) of every branch, and C, as the docstring has them."""
    out_channels = args.get('out_channels')
    out_channels = args['in_channels'] if out_channels is None else out_channels
    branches = args.get('branches')
    if branches is None:
        dilated = args.get('dilated', True)
        branches = [
            (3, (k - 1) // 2, args.get('groups', 32)) if dilated and k > 3 else (k, 1, args.get('groups', 32))
            for k in args.get('kernel_sizes', (3, 5))
        ]
    return [(k, d * args.get('dilation', 1), g) for k, d, g in branches], out_channels


def count_parameters(args):
    """By Eq. 1 to 6 alone."""
    branches, channels = resolved(args)
    share = args['in_channels'] // (len(branches) if args.get('split_input') else 1)
    position = args.get('norm_position', 'branch')
    total = sum(channels * (share // groups) * kernel**2 for kernel, _, groups in branches)
    total += len(branches) * channels * (bool(args.get('conv_bias')) + 2 * (position == 'branch'))
    total += 2 * channels * (position == 'output')
    select = args.get('select', 'channel')
    if select != 'sum':
        dim = max(channels // args.get('reduction', 16), args.get('min_dim', 32))
        logits = len(branches) * (channels if select == 'channel' else 1)
        total += dim * channels + (2 if args.get('reduce_norm', True) else 1) * dim
        total += logits * (dim + bool(args.get('select_bias')))
    return total
