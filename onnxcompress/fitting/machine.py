"""What can be told about the machine this runs on: processor, clock, instruction sets, caches, load.

A copy of this file goes with every kit, so it needs nothing but Python 3.8. What cannot be told is left out of
the answer; nothing here fails because a machine is unusual.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["describe", "load"]

ISA = [
    "sse4_1", "f16c", "avx", "avx2", "fma", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw", "avx512vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "neon", "asimd", "fphp",
    "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "sme",
]  # fmt: skip
"""Extensions that decide which kernels a runtime takes, as Linux names them."""

ARM_PARTS = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse N1", "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse V1", "0xd41": "Cortex-A78", "0xd44": "Cortex-X1", "0xd46": "Cortex-A510", "0xd47": "Cortex-A710",
    "0xd49": "Neoverse N2", "0xd4f": "Neoverse V2",
}  # fmt: skip
"""Part numbers Arm assigns (main ID register), as Linux prints them."""


def describe(root: str = "/") -> dict[str, Any]:
    """Facts about this machine.

    Args:
        root: where /proc and /sys are, for tests.

    Returns:
        ``cpu`` (name), ``arch``, ``system``, ``cores`` (physical), ``usable`` (processors this process may use),
        ``isa`` (of :data:`ISA`), ``caches`` (nearest first: ``name``, ``bytes``, ``shared`` between cores); and where
        they can be told ``frequency_ghz`` (highest), ``current_ghz``, ``memory_bytes`` and ``load`` (processes
        running on average over the last minute).
    """
    found: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine() or "unknown",
        "arch": platform.machine(),
        "system": platform.system() + " " + platform.release(),
        "cores": os.cpu_count() or 1,
        "usable": usable(),
        "isa": [],
        "caches": [],
    }
    if root != "/" or platform.system() == "Linux":
        found.update(_linux(Path(root)))
    elif platform.system() == "Darwin":
        found.update(_macos())
    elif platform.system() == "Windows":
        found.update(_windows())
    running = load()
    if running is not None:
        found["load"] = round(running, 2)
    return found


def usable() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float | None:
    """Processes that ran or waited, averaged over the last minute; None where the system does not count them."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _read(path: Path) -> str:
    """A file's text, stripped; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\r\n")
    except OSError:
        return ""


def _present(flags: Iterable[str]) -> list[str]:
    given = set(flags)
    return [flag for flag in ISA if flag in given]


def _size(text: str) -> int:
    """``"32K"`` in bytes; 0 if it is no size."""
    match = re.match(r"(\d+)([KMG]?)", text)
    return int(match.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[match.group(2)] if match else 0


# --- Linux -------------------------------------------------------------------------------------------------


def _linux(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    first: dict[str, str] = {}
    flags: list[str] = []
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        first.setdefault(key, value)
        if key in ("flags", "Features", "isa"):
            flags = flags or value.split()
    name = first.get("model name") or ARM_PARTS.get(first.get("CPU part", ""))
    board = _read(root / "proc/device-tree/model")
    if name or board:
        found["cpu"] = " of ".join(part for part in (name, board) if part)
    found["isa"] = _present(flags)
    cpus = root / "sys/devices/system/cpu"
    siblings = [_read(topology / "thread_siblings_list") for topology in sorted(cpus.glob("cpu[0-9]*/topology"))]
    if any(siblings):
        found["cores"] = len(set(siblings))
    highest = [_number(_read(p)) for p in cpus.glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq")]
    current = [_number(_read(p)) for p in cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    megahertz = _number(first.get("cpu MHz", ""))
    if any(current) or megahertz:
        found["current_ghz"] = round(max(current) / 1e6 if any(current) else megahertz / 1e3, 3)
    if any(highest):
        found["frequency_ghz"] = round(max(highest) / 1e6, 3)
    elif "current_ghz" in found:
        found["frequency_ghz"] = found["current_ghz"]
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"))
    if memory:
        found["memory_bytes"] = int(memory.group(1)) * 1024
    caches: list[tuple[int, dict[str, Any]]] = []
    threads = set(_numbers(siblings[0])) if siblings else {0}
    for cache in sorted((cpus / "cpu0/cache").glob("index*")):
        size, level = _size(_read(cache / "size")), _read(cache / "level")
        if size and level.isdigit() and _read(cache / "type") != "Instruction":
            shared = not set(_numbers(_read(cache / "shared_cpu_list"))) <= threads
            caches.append((int(level), {"name": "L" + level, "bytes": size, "shared": shared}))
    found["caches"] = [cache for _, cache in sorted(caches, key=lambda c: c[0])]
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _numbers(text: str) -> list[int]:
    """``"0-2,5"`` one by one."""
    found: list[int] = []
    for low, high in re.findall(r"(\d+)(?:-(\d+))?", text):
        found.extend(range(int(low), int(high or low) + 1))
    return found


# --- others, as far as it goes -----------------------------------------------------------------------------


def _macos() -> dict[str, Any]:
    try:
        text = subprocess.run(
            ["/usr/sbin/sysctl", "hw", "machdep.cpu"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return from_sysctl(text)


SYSCTL_ISA = {
    "hw.optional.avx2_0": "avx2", "hw.optional.avx512f": "avx512f", "hw.optional.avx512vnni": "avx512_vnni",
    "hw.optional.neon": "asimd", "hw.optional.AdvSIMD": "asimd", "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.neon_fp16": "asimdhp", "hw.optional.arm.FEAT_DotProd": "asimddp", "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.arm.FEAT_SME": "sme",
}  # fmt: skip


def from_sysctl(text: str) -> dict[str, Any]:
    """What macOS says of itself: lines of ``name: value``. Of two kinds of cores, the fast one."""
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    found: dict[str, Any] = {"isa": _present(name for key, name in SYSCTL_ISA.items() if values.get(key) == "1")}
    if values.get("machdep.cpu.brand_string"):
        found["cpu"] = values["machdep.cpu.brand_string"]
    for key, name, unit in (("hw.physicalcpu", "cores", 1), ("hw.memsize", "memory_bytes", 1)):
        if values.get(key, "").isdigit():
            found[name] = int(values[key]) * unit
    if _number(values.get("hw.cpufrequency_max", "")):
        found["frequency_ghz"] = round(_number(values["hw.cpufrequency_max"]) / 1e9, 3)
    caches = []
    for name, keys, shared in (
        ("L1", ("hw.perflevel0.l1dcachesize", "hw.l1dcachesize"), False),
        ("L2", ("hw.perflevel0.l2cachesize", "hw.l2cachesize"), "hw.perflevel0.l2cachesize" in values),
        ("L3", ("hw.l3cachesize",), True),
    ):
        sizes = [int(values[key]) for key in keys if values.get(key, "").isdigit()]
        if sizes and sizes[0]:
            caches.append({"name": name, "bytes": sizes[0], "shared": shared})
    found["caches"] = caches
    return found


def _windows() -> dict[str, Any]:
    found: dict[str, Any] = {}
    import ctypes
    import importlib

    registry: Any = importlib.import_module("winreg")
    kernel: Any = getattr(ctypes, "windll").kernel32  # noqa: B009  (there on Windows only)
    try:
        path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, path) as key:
            found["cpu"] = str(registry.QueryValueEx(key, "ProcessorNameString")[0]).strip()
            found["frequency_ghz"] = round(int(registry.QueryValueEx(key, "~MHz")[0]) / 1e3, 3)
    except OSError:
        pass  # no such key: the name stays that of platform.processor()
    features = ((17, "sse4_1"), (19, "asimd"), (39, "avx"), (40, "avx2"), (41, "avx512f"), (43, "asimddp"))
    found["isa"] = _present(name for number, name in features if kernel.IsProcessorFeaturePresent(number))
    return found
