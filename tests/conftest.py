"""For every test: one thread per process, as sums may depend on the number of threads; Ctrl-C ends the run."""

import signal

import torch

torch.set_num_threads(1)

try:
    from hypothesis import settings
except ImportError:  # the GPU tests run where no test tool but pytest is installed
    pass
else:
    settings.register_profile("untimed", deadline=None)  # how long an example takes says nothing about it
    settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script, where children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
