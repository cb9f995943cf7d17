"""A server's processes end with the process that started them, even where that one is killed.

vLLM's API process asks its engine to end. After a `kill -9` it cannot, and the engine would wait
for requests forever, with all its memory.

`multiprocessing` gives each process that it starts a pipe whose other end only the parent holds.
The kernel closes it however the parent ends, and a process that looks too late finds it closed.
PR_SET_PDEATHSIG would send its signal at the end of the *thread* that started the process, or of
the fork server. A parent's id would have to be polled.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import cache
from multiprocessing.util import register_after_fork

# Enables our plugins for vLLM, by VLLM_PLUGINS.
PLUGIN = "adaptive"
_POLL_S = 0.2


def end_with_parent() -> None:
    """Kill this process, and those that it forks later, when their parents have ended.

    A `vllm.general_plugins` entry: vLLM calls it in API processes, engine cores and workers of all
    servers in the environment. Does nothing unless VLLM_PLUGINS names our plugin, and nothing in a
    process that `multiprocessing` has not started, such as a server's first process.

    May be called repeatedly.
    """
    if PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(","):
        _cover_forks()
        # While a spawned process still imports its main module, under this name, it has no parent.
        if multiprocessing.parent_process() is not None or "__mp_main__" in sys.modules:
            _cover(os.getpid())


@cache
def _cover_forks() -> None:
    # A forked process has none of the threads; it calls this before its own function.
    register_after_fork(end_with_parent, lambda cover: cover())


@cache
def _cover(_pid: int) -> None:
    threading.Thread(target=_follow_parent, name="FollowParent", daemon=True).start()


def _follow_parent() -> None:
    parent_id = os.getppid()
    while (parent := multiprocessing.parent_process()) is None and os.getppid() == parent_id:
        time.sleep(_POLL_S)
    if parent is not None:
        parent.join()
    # Nobody is left who would read what an orderly end could still deliver.
    os.kill(os.getpid(), signal.SIGKILL)
