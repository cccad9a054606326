"""Tables of torch.distributed.pipelining: the public names of ``dualpipe.schedule.torch_table``."""

from dualpipe.schedule.torch_table import dumps_csv, load_csv, loads_csv

__all__ = ["dumps_csv", "load_csv", "loads_csv"]
