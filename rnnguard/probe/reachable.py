"""Everything mutable that can be reached from a model or an optimizer, however deep.

States live on attributes, in nested lists, in dicts, on plain helper objects, behind bound
methods and in closures; what a run may change in place must be found wherever it is held.
Global variables are not found, nor what is held by files, threads and other processes.
"""

from __future__ import annotations

import io
import logging
import queue
import random
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue as ProcessQueue
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

# What runs beside the run, or has a hold outside the process's memory, would fall out of step
# with itself when given back.
_OUTSIDE = (io.IOBase, logging.Logger, logging.Handler, queue.Queue, ProcessQueue, subprocess.Popen,
            BaseProcess, Executor, Future, threading.Thread, threading.Condition, threading.Event,
            threading.Semaphore, threading.Barrier, _BaseDataLoaderIter)  # fmt: skip
# Classes are not state; data sets are read, not written, and may be larger than memory.
_LEFT_OUT = (type, ModuleType, DataLoader, Dataset, *_OUTSIDE)
RANDOM = (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)


def mutables(*roots: object) -> Iterator[Any]:
    """Each mutable object that can be reached from the roots, once, owners before held."""
    pending, seen = deque(roots), set[int]()
    while pending:
        held = pending.popleft()
        if isinstance(held, DataLoader):
            pending.extend(generators(held))
        if id(held) in seen or isinstance(held, _LEFT_OUT):
            continue
        seen.add(id(held))
        if isinstance(held, tuple):
            pending.extend(held)
        elif isinstance(held, dict):
            yield held
            pending.extend(held.values())
        elif isinstance(held, list | set | deque):
            yield held
            pending.extend(held)
        elif isinstance(held, Tensor):
            yield held
            if is_leaf(held) and held.grad is not None:
                pending.append(held.grad)
        elif isinstance(held, (numpy.ndarray, *RANDOM)):
            yield held
        elif isinstance(held, CellType):
            yield held
            pending.extend(contents_of(held))
        else:
            pending.extend(_behind(held))
            if isinstance(getattr(held, "__dict__", None), dict):
                if not isinstance(held, FunctionType):
                    yield held
                pending.append(vars(held))


def generators(data: object) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers draw their order from."""
    batch_sampler = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), batch_sampler,
               getattr(batch_sampler, "sampler", None))  # fmt: skip
    found = {id(g): g for g in (getattr(holder, "generator", None) for holder in holders)}
    return [g for g in found.values() if isinstance(g, torch.Generator)]


def _behind(held: Any) -> tuple[Any, ...]:
    """What a callable acts on: the object of a bound method, the variables of a closure."""
    if isinstance(held, MethodType):
        return held.__self__, held.__func__
    if isinstance(held, BuiltinFunctionType):
        return (held.__self__,)
    if isinstance(held, FunctionType):
        return *(held.__closure__ or ()), *(held.__defaults__ or ()), held.__kwdefaults__
    return (held.func, held.args, held.keywords) if isinstance(held, partial) else ()


def contents_of(cell: CellType) -> tuple[Any, ...]:
    """The variable's value; nothing where it has none yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def is_leaf(tensor: Tensor) -> bool:
    """Whether the tensor has a gradient of its own to hold."""
    return not isinstance(tensor, UninitializedParameter | UninitializedBuffer) and tensor.is_leaf
