"""The part of the recorder that runs in the recorded process: it watches torch and writes events.

It uses only torch and the standard library, imports itself relatively and never names ``dualpipe``, because the
recorded program may have another package of that name.  ``startup`` loads this folder under the name
``_dualpipe_recorder``.

===========  ==========================================================================================
log          the event log, and the line of the program that an event comes from
marks        marks on tensors, which show where a tensor comes from
graph        the same in the nodes of autograd graphs
origins      what the marks mean, and which forward takes a tensor
forwards     the forwards of the rank, and which of them are one
parameters   the modules and parameters of the rank, and where gradients are kept
masters      gradients that the program keeps in tensors of its own
owed         the weight gradients that a backward has left out
gradients    changes of gradients outside of the engine
flow         turns module calls, backwards, changes of gradients and messages into events, by the marks
engine       the autograd engine, to be wrapped
compute      watches torch: module calls, the autograd engine, every operator, ``.grad``
messages     watches torch.distributed's point-to-point calls
pending      a message in flight, as its work that the program waits for
collectives  watches torch.distributed's collectives
singles      the collectives of groups with one member, in a plain run
transport    calls torch's own functions
arrivals     tensors that leave torch's operators and come back
errors       errors of the program
stacks       where the program is when the recorder stops it
plain        runs the modules of a step once more, plainly, to compare with
replay       the plain run of one forward
draws        the random numbers that modules draw, for the plain run
buffers      the memory of messages: who touches it, and which of it graphs need
cuda         answers CUDA calls on the CPU: devices and tensors
torch_cuda   the same for torch.cuda: devices, memory, random states
streams      streams and events
nccl         gloo in place of NCCL
startup      installs all of that in a new process
ranks        forks the ranks of a script
===========  ==========================================================================================
"""
