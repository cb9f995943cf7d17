"""A server's processes end with the process that started them, even where that one is killed.

vLLM ends its processes as long as the one that started them can ask for it. After a `kill -9` of
the API process, its engine core would wait for requests forever, with all its memory.

`multiprocessing` gives each process that it starts a pipe whose other end only the parent holds, so
the kernel closes it however the parent ends, and a process that looks too late finds it closed.
PR_SET_PDEATHSIG would send its signal when the *thread* that started the process ends, or, with the
start method forkserver, when the fork server does. A parent's id would have to be polled, and is 1
in a container as well as after the parent's end.
"""

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time

PLUGIN = "adaptive"
# For an orderly end. A worker sees its engine core end only after the core has had as long.
GRACE_S = 3.0

_is_registered = False
_follower_pid: int | None = None


def end_with_parent() -> None:
    """End this process soon after its parent. May be called repeatedly.

    A `vllm.general_plugins` entry, which vLLM calls in the API process, engine cores and workers.

    Does nothing where `VLLM_PLUGINS` does not name our plugin: engines outside a server are left
    alone. Does nothing in processes that `multiprocessing` has not started: a server's first
    process, a notebook, Ray's workers.
    """
    global _is_registered, _follower_pid
    if PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    if not _is_registered:
        # Called whenever `multiprocessing` is about to run a new process's function: a forked one
        # has no other thread, and a spawned one that is still importing does not know its parent.
        multiprocessing.util.register_after_fork(end_with_parent, lambda follow: follow())
        _is_registered = True
    if multiprocessing.parent_process() is not None and _follower_pid != os.getpid():
        _follower_pid = os.getpid()
        threading.Thread(target=_follow_parent, name="FollowParent", daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
