"""A few of the kills of ``make soak``: killed and resumed is what was never killed, and nothing is left over."""

import torch
from soak import soak


def test_killed_and_resumed_is_what_was_never_killed(tmp_path):
    torch.set_num_threads(1)
    tally = soak(tmp_path, kills=6, steps=3, progress=False)
    assert tally.kills >= 6 and tally.while_writing and tally.finished and not tally.wrong, str(tally)
