"""Compiles every file of kernels/cu for the architectures we support, with NVRTC and no GPU.

A file that includes attention.cuh is compiled for several widths of a head. What fails: an error, a
warning, a spill, or local memory. Prints the registers and the static shared memory of every kernel,
one a line, in the order of files, architectures and widths. Each core compiles for itself.

    compile_cubins.py KERNELS_FOLDER

NVRTC comes from the package nvidia-cuda-nvrtc; nothing else of CUDA is needed.
"""

import ctypes
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import nvidia

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]
# HEAD_DIMS of kernels/src/cuda/packed.rs.
HEAD_DIMS = [16, 32, 48, 64, 80, 96, 112, 128, 256]
PTXAS_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Nvrtc:
    def __init__(self) -> None:
        folder = next(Path(path) / "cu13/lib" for path in nvidia.__path__ if (Path(path) / "cu13/lib").is_dir())
        # NVRTC looks for its builtins by name alone, and finds them when they are loaded already.
        for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(folder / "libnvrtc.so.13"))

    def compile(self, source: Path, headers: list[Path], options: list[str]) -> tuple[bool, str]:
        """Whether the file compiles, and the log."""
        texts = (ctypes.c_char_p * len(headers))(*[header.read_bytes() for header in headers])
        names = (ctypes.c_char_p * len(headers))(*[header.name.encode() for header in headers])
        program = ctypes.c_void_p()
        name = source.name.encode()
        self.check(self.library.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), name, len(headers), texts, names))
        flags = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        result = self.library.nvrtcCompileProgram(program, len(options), flags)
        size = ctypes.c_size_t()
        self.check(self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        self.check(self.library.nvrtcGetProgramLog(program, log))
        cubin_size = ctypes.c_size_t()
        if result == 0:
            self.check(self.library.nvrtcGetCUBINSize(program, ctypes.byref(cubin_size)))
        self.check(self.library.nvrtcDestroyProgram(ctypes.byref(program)))
        return result == 0 and cubin_size.value > 0, log.value.decode()

    def check(self, result: int) -> None:
        if result != 0:
            raise SystemExit(f"error: NVRTC answers {result}")


def resources(log: str, label: str) -> list[str]:
    """A line for each kernel that the log tells of."""
    lines = []
    for kernel in PTXAS_KERNEL.finditer(log):
        for what in ["stack", "stores", "loads"]:
            if int(kernel[what]):
                raise SystemExit(f"error: {label}: {kernel['name']} spills or uses local memory:\n{log}")
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        shared_bytes = int(shared[1]) if shared else 0
        lines.append(f"{kernel['name']} {label}: {kernel['registers']} registers, {shared_bytes} bytes shared")
    return lines


@cache
def nvrtc_of_process() -> Nvrtc:
    return Nvrtc()


def compile_one(source: Path, architecture: str, width: int | None) -> list[str]:
    """What the kernels of a file take for an architecture, and for a width of heads where the file has one."""
    options = ["--std=c++17", f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    options += [] if width is None else [f"-DHEAD_DIM={width}"]
    label = architecture if width is None else f"{architecture} HEAD_DIM={width}"
    is_made, log = nvrtc_of_process().compile(source, sorted(source.parent.glob("*.cuh")), options)
    if not is_made or "warning" in log:
        raise SystemExit(f"error: {source.name} for {label}:\n{log}")
    lines = resources(log, label)
    if not lines:
        raise SystemExit(f"error: {source.name} for {label}: the log tells of no kernel:\n{log}")
    return lines


def main() -> None:
    asked = [
        (source, architecture, width)
        for source in sorted(Path(sys.argv[1]).glob("*.cu"))
        for architecture in ARCHITECTURES
        for width in (HEAD_DIMS if '"attention.cuh"' in source.read_text() else [None])
    ]
    with ProcessPoolExecutor() as pool:
        for lines in pool.map(compile_one, *zip(*asked)):
            print("\n".join(lines))


if __name__ == "__main__":
    main()
