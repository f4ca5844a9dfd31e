"""What a process is: started and stopped as a rank, its libraries quiet, its errors one line."""

import errno
import logging
import os
import random
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from pocl.common.console import CONSOLE, LOG
from pocl.common.errors import Interrupted, RankStopped, RunStopped, UserError

if TYPE_CHECKING:
    import torch


def start() -> "torch.device":
    """Join the process group that the launcher describes (a group of one without a launcher) -> this rank's device.

    On a CPU, matmuls use the fastest library from then on (pocl/cli/cpu.py).
    """
    import torch

    from pocl.cli import cpu
    from pocl.common import distributed

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    use_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if use_cuda:
        # Packed micro-batches differ in size at every step: segments that grow keep the cache from fragmenting.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(local_rank)
        # On an H100 or H200 torch prefers cuDNN's attention, which builds a plan for every new shape: tens of
        # milliseconds for each generated token. Flash attention has no such plans.
        torch.backends.cuda.enable_cudnn_sdp(False)
    distributed.join()
    if use_cuda:
        return torch.device("cuda", local_rank)
    cpu.use_fastest()
    return torch.device("cpu")


def stop() -> None:
    """Leave the process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def stop_on_sigterm() -> None:
    """From now on SIGTERM is as Ctrl-C: a KeyboardInterrupt, on whose way out children are ended."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch; torch differs by rank, so that dropout does."""
    import numpy as np
    import torch

    from pocl.common.distributed import rank

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + rank())


def quiet_libraries() -> None:
    """Keep the libraries' chatter off the screen: their progress bars and warnings stand between ours."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


# Errors of a disk or a folder, wherever something is written or read.
_DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENOENT", "ENOTDIR")
}


class _Screen(logging.Handler):
    """Prints a record's text, with flags in the place of parameters."""

    def emit(self, record: logging.LogRecord) -> None:
        CONSOLE.print(in_flags(record.getMessage()), markup=False)


def _print_what_is_logged() -> None:
    if not any(isinstance(handler, _Screen) for handler in LOG.handlers):
        LOG.addHandler(_Screen())
        LOG.setLevel(logging.INFO)
        LOG.propagate = False


def in_flags(text: str) -> str:
    """A message of the library as one of a command: a parameter `` `max_length` `` becomes ``--max-length``."""
    return re.sub(r"`([a-z]\w*)`", lambda name: "--" + name[1].replace("_", "-"), text)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that a device, or the CPU, has no room for a tensor."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "not enough memory: you tried to allocate" in str(error)


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a UserError becomes one line and exit status 2, RunStopped one line and status 1.

    So do memory that is exhausted, and a disk that is full, read-only or gone (status 1).  POCL_DEBUG=1 in the
    environment adds the traceback.
    """
    _print_what_is_logged()
    try:
        main()
    except (UserError, RunStopped) as error:
        if os.environ.get("POCL_DEBUG") == "1":
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        if rank == "0" or isinstance(error, RankStopped):
            print(f"error: {in_flags(str(error))}", file=sys.stderr, flush=True)
        elif not isinstance(error, Interrupted):  # all ranks stop together
            # Usually every rank hits the mistake at the same place, and rank 0 reports it: the launcher then ends
            # the others. A rank that is still alive hit it alone, for example because its machine lacks a file.
            time.sleep(3)
            print(f"error on rank {rank}: {in_flags(str(error))}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else error.exit_status)
    except OSError as error:
        if error.errno not in _DISK or os.environ.get("POCL_DEBUG") == "1":
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {what}; what was saved before is intact; the same command resumes", file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError as error:
        if not _is_out_of_memory(error) or os.environ.get("POCL_DEBUG") == "1":
            raise
        what = str(error).splitlines()[0]
        print(
            f"error: out of memory ({what}); lower --max-tokens, --chunk-tokens or --eval-batch-size (--plan shows "
            "what takes it); what was saved before is intact",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("stopped; the same command resumes", file=sys.stderr, flush=True)
        sys.exit(130)
