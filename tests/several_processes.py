"""Run a function in several processes on the CPU, as if torchrun had started them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["cpn_fast.stages.cam", "cpn_fast.stages.evaluate", "cpn_fast.stages.train"]
)  # so that they are imported only once


def run_in_processes(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
    """Return the results of ``function(*arguments)`` in ``world`` processes. Fails if a process fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
    processes = [
        CONTEXT.Process(target=_run, args=(number, world, port, pipe, function, arguments), daemon=True)
        for number, (_, pipe) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        results = []
        for number, (pipe, _) in enumerate(pipes):
            assert pipe.poll(timeout), f"process {number} of {world} gave no result in {timeout} s"
            results.append(pipe.recv())
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = {number: result for number, result in enumerate(results) if isinstance(result, BaseException)}
    assert not errors, errors
    return results


def start_command(*arguments: str) -> Any:
    """Run ``cpn-fast ARGUMENTS`` in a new process, without the seconds of its imports."""
    process = CONTEXT.Process(target=_command, args=(arguments,))
    process.start()
    return process


def _command(arguments: tuple[str, ...]) -> None:
    from cpn_fast import cli

    sys.argv = ["cpn-fast", *arguments]
    cli.main()


def _run(number: int, world: int, port: int, pipe: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    try:
        result = function(*arguments)
    except BaseException as error:
        pipe.send(error)
        raise
    pipe.send(result)
    pipe.close()
    from cpn_fast.runtime import distributed

    distributed.join().wait()  # no process may end while another still talks to it
