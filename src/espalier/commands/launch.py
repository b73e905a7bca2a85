"""`espalier launch`: `espalier train`, or a script, in several processes on one machine or many."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from typing import Annotated, Any

import typer

from espalier.commands import train
from espalier.commands.outcome import BUG, LAUNCHED, MISTAKE, STOPPED, Interrupted, fail
from espalier.errors import SettingError
from espalier.wording import flag

EXAMPLE = """\
espalier launch --model demo-encoder --train reviews.csv --method lora --num-processes 2
espalier launch --num-machines 4 --machine-rank 0 --main-process-ip 10.0.0.1 --config run.yaml
espalier launch my_loop.py --steps 100"""

SETTINGS: dict[str, Any] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True}
}
_OWN = "Processes and machines"


def _option(text: str, metavar: str) -> Any:
    return typer.Option(help=text, metavar=metavar, show_default=False, rich_help_panel=_OWN)


def command(
    ctx: typer.Context,
    num_processes: Annotated[
        int | None,
        _option("Processes on all machines together; one per GPU, or one without GPUs.", "N"),
    ] = None,
    num_machines: Annotated[int, _option("Machines. \\[1]", "N")] = 1,
    machine_rank: Annotated[int, _option("This machine's number, from 0. \\[0]", "N")] = 0,
    main_process_ip: Annotated[
        str | None, _option("Address of machine 0, needed with several machines.", "ADDRESS")
    ] = None,
    main_process_port: Annotated[
        int | None, _option("Port there; a free one, or 29500 with several machines.", "N")
    ] = None,
    gpu_ids: Annotated[
        str | None, _option("GPUs to use here, like 0,1; all if left out.", "N,...")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU.", rich_help_panel=_OWN)] = False,
) -> None:
    """Train in several processes: all flags of `espalier train` are passed on to it.

    Written before anything else, a script (`espalier launch my_loop.py ...`) runs in its place.
    On one process all runs here, without a launcher.
    """
    here = _gpus(gpu_ids, cpu)
    total = num_machines * max(1, here) if num_processes is None else num_processes
    _check(total, num_machines, machine_rank, main_process_ip)
    words = list(ctx.args)
    script = [words.pop(0)] if words and words[0].endswith(".py") else []
    run = None if script or total == 1 else train.read(words)  # a mistake is said once, and now
    if total == 1 or not (script or run):
        _run_here(script, words)
        return
    if run and run.out:  # chosen now, so that a stopped run can be named
        words += ["--out", str(run.out)]
    options = {
        "num_processes": total,
        "num_machines": num_machines,
        "machine_rank": machine_rank,
        "main_process_ip": main_process_ip,
        "main_process_port": main_process_port or (29500 if num_machines > 1 else 0),
        "gpu_ids": gpu_ids,
    }
    try:
        _launch(arguments(options, script, words), total, cpu=here == 0)
    except _Ended as ended:
        stands = train.kept(run, again(options, cpu)) if run else _ANEW
        if ended.said is None:
            raise Interrupted(f"all processes; {stands}") from None
        fail(f"{ended.said} {stands[0].upper()}{stands[1:]}")
        raise typer.Exit(BUG) from None


_ANEW = "a run with saved steps goes on with the same command and --resume."


class _Ended(Exception):
    """The processes ended before their work was done.

    Attributes:
        said: What to say of the one that ended first; None for Ctrl-C.
    """

    def __init__(self, said: str | None) -> None:
        super().__init__(said)
        self.said = said


def again(options: dict[str, Any], cpu: bool) -> str:
    """The command, up to what is passed on, that starts these processes again."""
    told = {"num_machines": 1, "machine_rank": 0, "main_process_port": 0}
    words = [
        word
        for name, value in options.items()
        if value not in (None, told.get(name))
        for word in (flag(name), str(value))
    ]
    return shlex.join(["espalier", "launch", *words, *(["--cpu"] if cpu else [])])


def arguments(options: dict[str, Any], script: list[str], words: list[str]) -> list[str]:
    """The words for `accelerate launch`, of what is not its default alone."""
    per = max(1, _cores() // (options["num_processes"] // options["num_machines"]))
    # Precision is the trainer's own affair, compiling too.
    told = {**options, "mixed_precision": "no", "dynamo_backend": "no"}
    told["num_cpu_threads_per_process"] = per
    given = [word for k, v in told.items() if v is not None for word in (f"--{k}", str(v))]
    return [*given, "--multi_gpu", *(script or ["--module", "espalier", "train"]), *words]


def _check(total: int, machines: int, rank: int, address: str | None) -> None:
    if total < 1 or machines < 1:
        raise SettingError("--num-processes and --num-machines are at least 1")
    if total % machines:
        raise SettingError(
            f"--num-processes counts those of all machines: {total} cannot be shared evenly by "
            f"{machines} machines"
        )
    if not 0 <= rank < machines:
        raise SettingError(f"--machine-rank is from 0 to {machines - 1}; got {rank}")
    if machines > 1 and address is None:
        raise SettingError(
            "several machines meet at the first one: give its address on every machine, "
            "--main-process-ip 10.0.0.1"
        )


def _gpus(ids: str | None, cpu: bool) -> int:
    """How many GPUs to use on this machine."""
    if cpu:
        return 0
    import torch

    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return min(found, len(ids.split(","))) if ids and ids != "all" else found


def _cores() -> int:
    from espalier.training.threads import usable_cores

    return usable_cores()


def _run_here(script: list[str], words: list[str]) -> None:
    """The one process: this one, or a script's."""
    if script:
        done = subprocess.run([sys.executable, *script, *words])
        if done.returncode:
            raise typer.Exit(done.returncode)
        return
    from espalier.commands import main

    if code := main(["train", *words]):
        raise typer.Exit(code)


def _launch(words: list[str], total: int, cpu: bool) -> None:
    """Start the processes by accelerate and wait for them.

    Raises:
        _Ended: One of them ended the others, or Ctrl-C did.
    """
    import logging

    from accelerate.commands.launch import launch_command_parser, multi_gpu_launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(words)
    os.environ["OMP_NUM_THREADS"] = str(args.num_cpu_threads_per_process)
    os.environ[LAUNCHED] = "1"
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it shorter
    try:
        multi_gpu_launcher(args)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda pair: pair[1].timestamp)
        if failure.exitcode == MISTAKE and rank == 0:
            raise typer.Exit(MISTAKE) from None  # it has said what there is to put right
        stopped = failure.exitcode in (STOPPED, -signal.SIGINT)
        raise _Ended(None if stopped else ended(rank, total, failure.exitcode)) from None
    except (SignalException, KeyboardInterrupt):
        raise _Ended(None) from None
    finally:
        del os.environ[LAUNCHED]  # here it is said


def ended(rank: int, total: int, code: int) -> str:
    """What to say of the process that ended first, and took the others with it."""
    how = f"exit code {code}"
    if code < 0:
        known = -code in set(signal.Signals)
        how = signal.Signals(-code).name if known else f"signal {-code}"
        if -code == signal.SIGKILL:
            how += ", as when the machine's memory is full"
    return (
        f"process {rank} of {total} ended ({how}), and the others were stopped: nothing can be "
        "added up without it. What it had to say stands above."
    )
