"""What a fork does to a client: the child forgets every connection, event loop and thread of its parent.

A forked process has its parent's objects without the threads that served them, and shares the parent's sockets and
epoll instance. The child must neither use these objects nor tidy them up: a destructor that closes a connection
would take the parent's connection off the shared epoll instance.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import weakref
from collections.abc import Iterable
from typing import Protocol


class Inherited(Protocol):
    """An object that has to begin anew in a forked process."""

    def after_fork(self) -> Iterable[object]:
        """Forget the parent's state, and return it: it is kept from every destructor."""


_living: weakref.WeakSet[Inherited] = weakref.WeakSet()


def begin_anew_in_children(inherited: Inherited) -> None:
    """Call `after_fork` of `inherited` in every process that is forked from this one."""
    _living.add(inherited)


def _after_fork() -> None:
    for inherited in list(_living):
        state = list(inherited.after_fork())
        tasks = [asyncio.all_tasks(loop) for loop in state if isinstance(loop, asyncio.AbstractEventLoop)]
        # a reference that is never given back, because modules and their lists are cleared before the process ends
        ctypes.pythonapi.Py_IncRef(ctypes.py_object([state, tasks]))


os.register_at_fork(after_in_child=_after_fork)
