"""The side of the recorder that lives in the recorded process: it watches, and writes down what it sees.

It needs torch and the standard library alone, imports itself relatively and never names ``dualpipe``: the recorded
program may have another package of that name, and in its process that one is the right one.  ``startup`` loads this
folder under the name ``_dualpipe_recorder``.

===========  ==========================================================================================
log          where the events go, and which line of the program an event comes from
tags         which tensor holds what: a mark on its storage
flow         what a module call, a backward, an update of a gradient and a message mean, told by the marks
compute      puts the watch on torch: module calls, the autograd engine, every operator, ``.grad``
messages     puts it on torch.distributed's point-to-point calls
cuda         answers CUDA calls on the CPU
startup      all of that in a process that has just started
===========  ==========================================================================================
"""
