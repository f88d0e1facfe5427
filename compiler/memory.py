"""How much memory is left, where the system tells."""

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that can be had without swapping, within the container's limit; None where nobody tells (not Linux)."""
    found = [size for size in (_system(), _container()) if size is not None]
    return min(found, default=None)


def _system() -> int | None:
    """MemAvailable of /proc/meminfo (proc_meminfo(5)), in kB there."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _container() -> int | None:
    """What is left below memory.max of cgroup v2, file pages not counted; None without a limit."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - int(used) + int(stat.get("file", 0))
