"""The machine: its GPUs, its memory, the type that it computes in."""

import os
import resource
from contextlib import suppress
from pathlib import Path

from pipeline.script import command, say

LIBRARIES = 1.5e9  # bytes of a host that torch and its friends take: measured at 135 M parameters


def compute_dtype():
    """bfloat16 where the GPU has it, float16 on older ones, float32 on the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def own_gpu(script):
    """One process takes one GPU: under a launcher that of its rank, else the first. Call it before CUDA is used.

    The Trainer would spread one process over all visible GPUs, which 4-bit weights do not survive.
    """
    import torch

    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return
    count = torch.cuda.device_count()  # asks the driver, and leaves CUDA_VISIBLE_DEVICES to be changed
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        launch = f"{command('accelerate')} launch --num_processes {count} {script}"
        say(f"taking one of {count} GPUs; for all of them: {launch}")


def warn_of_load():
    """One line where other programs keep the cores busy: threads that wait for one another then slow a run down."""
    import psutil

    if "OMP_NUM_THREADS" in os.environ:
        return
    taken = psutil.cpu_percent(0.3)  # while this process sleeps; a load average still has the script before it
    if taken > 50:
        remedy = "press Ctrl-C and start again with OMP_NUM_THREADS=1 in front, which is often 10 times as fast"
        say(f"warning: other programs take {taken:.0f} % of this machine's processor time: {remedy}")


def under_fsdp():
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def peak_memory():
    """Highest memory so far of this process, in GB: on the GPU, or on the host where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def host_memory(root="/"):
    """Bytes that this process can have: what is free and what it has, within ulimit's and control groups' limits."""
    import psutil

    used = psutil.Process().memory_info()
    rooms = [psutil.virtual_memory().available + used.rss]
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY:
        rooms.append(addresses - used.vms + used.rss)
    for line in Path(root, "proc/self/cgroup").read_text().splitlines():
        _, kinds, group = line.split(":", 2)
        file = "sys/fs/cgroup/memory/{}/memory.limit_in_bytes" if kinds == "memory" else "sys/fs/cgroup/{}/memory.max"
        for place in (Path(group), *Path(group).parents):  # each limits it; in a container the root alone may exist
            with suppress(OSError, ValueError):  # no such group, or "max"
                rooms.append(int(Path(root, file.format(place)).read_text()))
    return min(rooms)
