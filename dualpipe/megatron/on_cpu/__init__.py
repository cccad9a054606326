"""Stand-ins with which Megatron trains on a CPU over gloo: a rehearsal of a job, and the tests of this package.

``install_cpu_standins`` covers megatron-core, ``install_loop_standins`` also the training loop of Megatron-LM
(``python -m dualpipe.megatron.launch --on-cpu``).  A job on GPUs uses neither.
"""

from dualpipe.megatron.on_cpu.core import install_cpu_standins, remove_cpu_standins
from dualpipe.megatron.on_cpu.loop import install_loop_standins

__all__ = ["install_cpu_standins", "install_loop_standins", "remove_cpu_standins"]
