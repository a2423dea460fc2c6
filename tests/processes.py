"""Runs a function in several processes that train together over gloo, on this machine."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

Work = Callable[..., Any]


def together(work: Work, folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """What `work(rank, *arguments)` gives in each of the processes; fails when one fails.

    `work` is a function of a test module, and what it gives can be saved by torch.
    """
    spawning = torch.multiprocessing.get_context("spawn")
    folder.mkdir(exist_ok=True)
    started = [
        spawning.Process(target=_run, args=(work, rank, count, folder, arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(60)
        results = [folder / f"{rank}.pt" for rank in range(count)]
        failed = [file.read_text() for file in sorted(folder.glob("*.failed"))]
        assert not failed, "\n".join(failed)
        assert all(file.exists() for file in results), "a process hung or died"
        return [torch.load(file, weights_only=False) for file in results]
    finally:
        for process in started:
            process.kill()
            process.join()


def _run(work: Work, rank: int, count: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=50),
    )
    try:
        result = work(rank, *arguments)
        torch.save(result, folder / f"{rank}.saving")
        (folder / f"{rank}.saving").rename(folder / f"{rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        (folder / f"{rank}.failed").write_text(f"process {rank}\n{traceback.format_exc()}")
        raise
    finally:
        torch.distributed.destroy_process_group()
