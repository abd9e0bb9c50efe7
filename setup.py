"""Builds the native modules.

`ep_runtime._C`       host backend; with nvcc the CUDA backend as well
`ep_runtime._nvshmem` NVSHMEM's host API; only with nvcc and the wheel nvidia-nvshmem-cu13

nvcc is looked for in EP_NVCC, CUDA_HOME, PATH and the pip CUDA toolkit, in this order.
One that does not work ends the build if EP_NVCC or CUDA_HOME names it, else it is passed over.
EP_NO_CUDA=1 leaves CUDA out. EP_CUDA_ARCHS="90;100" chooses the GPUs (default 90); PTX of the last
one is added for newer GPUs. CXX, CXXFLAGS and MAX_JOBS are honoured. Needs no torch, no network.

Objects lie in build/objects under a hash of their command and are reused while nothing they include
(by the compiler's own dependency file) is newer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "objects"
CXX = shlex.split(os.environ.get("CXX", "").strip() or "g++")
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Werror=cross-execution-space-call"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
ARCHS_FORMAT = (
    "give numbers of 90 or more, with a or f behind where wanted, as in EP_CUDA_ARCHS='90;100'"
)
NAMED = ("EP_NVCC", "CUDA_HOME")  # an nvcc that the user named must work


def say(text: str) -> None:
    print(f"ep_runtime: {text}", file=sys.stderr, flush=True)


def max_jobs() -> int:
    text = os.environ.get("MAX_JOBS", "").strip()
    if not text:
        return os.cpu_count() or 1
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise SystemExit(f"ep_runtime: MAX_JOBS={text!r}: give a whole number of 1 or more")
    return int(text)


def cuda_archs() -> list[str]:
    text = os.environ.get("EP_CUDA_ARCHS", "").strip() or "90"
    archs = [a for a in re.split(r"[;, ]+", text) if a]
    for arch in archs:
        if not re.fullmatch("[0-9]{2,3}[af]?", arch) or int(arch.rstrip("af")) < 90:
            raise SystemExit(f"ep_runtime: EP_CUDA_ARCHS={text!r} holds {arch!r}; {ARCHS_FORMAT}")
    if not archs:
        raise SystemExit(f"ep_runtime: EP_CUDA_ARCHS={text!r} is empty; {ARCHS_FORMAT}")
    return archs


def site_directories() -> list[Path]:
    """Where wheels lie, also when pip builds in an isolated environment that hides them."""
    known = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    return [Path(p) for p in dict.fromkeys([*known, *(p for p in sys.path if p)])]


def find_wheel_directory(*parts: str) -> Path | None:
    candidates = (d.joinpath(*parts) for d in site_directories())
    return next((d for d in candidates if d.is_dir()), None)


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler and what to compile for."""

    nvcc: str
    version: str
    include: list[str]
    libraries: list[str]
    archs: list[str]

    @property
    def gencode(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        newest = self.archs[-1]
        return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def nvcc_candidates() -> Iterator[tuple[str, str | None]]:
    yield "EP_NVCC", os.environ.get("EP_NVCC")
    home = os.environ.get("CUDA_HOME")
    yield "CUDA_HOME", f"{home}/bin/nvcc" if home else None
    yield "PATH", shutil.which("nvcc")
    wheel = find_wheel_directory("nvidia", "cu13", "bin")
    yield "pip CUDA toolkit", str(wheel / "nvcc") if wheel else None


@functools.cache
def find_cuda() -> tuple[Cuda | None, str]:
    """The compiler, or why there is none. A compiler that was asked for by name must work."""
    if os.environ.get("EP_NO_CUDA", "0") not in ("", "0"):
        return None, "EP_NO_CUDA is set"
    archs = cuda_archs()
    broken: list[str] = []
    for found_by, path in nvcc_candidates():
        if not path:
            continue
        if not shutil.which(path):
            if found_by in NAMED:
                raise SystemExit(
                    f"ep_runtime: {found_by} says {path}, which is no program; unset it"
                )
            continue
        try:
            cuda = describe_cuda(path, archs)
        except BrokenNvcc as error:
            if found_by in NAMED:
                raise SystemExit(
                    f"ep_runtime: {found_by} says {path}, which does not work: {error}\n"
                    "ep_runtime: set EP_NVCC or EP_NO_CUDA=1"
                ) from None
            why = str(error).partition("\n")[0]
            broken.append(f"nvcc from {found_by} ({path}) does not work: {why}")
            say(broken[-1])
            continue
        return cuda, f"nvcc {cuda.version} from {found_by} ({path})"
    return None, "; ".join(broken) or "no nvcc in EP_NVCC, CUDA_HOME, PATH or the pip CUDA toolkit"


class BrokenNvcc(Exception):
    """An nvcc that does not run, or does not answer like one; says how."""


def ask_nvcc(nvcc: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [nvcc, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BrokenNvcc(str(error)) from error
    if done.returncode != 0:
        told = done.stderr.strip() or done.stdout.strip() or "it says nothing"
        raise BrokenNvcc(f"status {done.returncode} from {arguments[0]}: {told}")
    return done


def describe_cuda(nvcc: str, archs: list[str]) -> Cuda:
    """Ask nvcc itself where its headers and libraries are: `nvcc` may be a wrapper script."""
    version = re.search(r"release [\d.]+, V([\d.]+)", ask_nvcc(nvcc, "--version").stdout)
    dry = ask_nvcc(nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    if top is None or version is None:
        raise BrokenNvcc("it does not answer like nvcc")
    root = Path(top.group(1).strip()).resolve()
    include = [root / "include", *root.glob("targets/*/include")]
    libraries = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    return Cuda(
        nvcc=nvcc,
        version=version.group(1),
        include=[str(p) for p in include if (p / "cuda_runtime.h").exists()],
        libraries=[str(p) for p in libraries if (p / "libcudart_static.a").exists()],
        archs=archs,
    )


def is_fresh(target: Path, dependency_file: Path) -> bool:
    """No file that the compiler read for `target` has changed since."""
    if not (target.exists() and dependency_file.exists()):
        return False
    text = dependency_file.read_text().replace("\\\n", " ")
    read = re.split(r"(?<!\\)\s+", text.partition(": ")[2].strip())
    made = target.stat().st_mtime_ns
    paths = [Path(p.replace("\\ ", " ")) for p in read if p]
    return all(p.exists() and p.stat().st_mtime_ns <= made for p in paths)


def compile_one(source: Path, command: list[str]) -> Path:
    """One object, through a temporary name: builds may run side by side in one checkout."""
    digest = hashlib.sha256("\0".join([*command, str(source)]).encode()).hexdigest()[:12]
    target = OBJECTS / f"{source.stem}-{digest}.o"
    dependencies = target.with_suffix(".d")
    if is_fresh(target, dependencies):
        return target
    OBJECTS.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}.o")
    wanted = target.with_suffix(f".{os.getpid()}.d")
    full = [*command, "-c", str(source), "-o", str(scratch), "-MMD", "-MF", str(wanted)]
    say(f"compiling {source.relative_to(ROOT)}")
    done = subprocess.run(full, capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode != 0:
        raise CompileError(f"status {done.returncode} from: {shlex.join(full)}")
    wanted.replace(dependencies)
    scratch.replace(target)
    return target


def host_command(cuda: Cuda | None, *extra: str) -> list[str]:
    import pybind11

    include = [str(CSRC), pybind11.get_include(), sysconfig.get_path("include")]
    include += cuda.include if cuda else []
    archs = ",".join(cuda.archs) if cuda else ""
    defines = [f'-DEP_CUDA_ARCHS="{archs}"']
    defines += ["-DEP_WITH_CUDA=1"] if cuda else []
    isystem = [f"-isystem{p}" for p in include[1:]]
    user = shlex.split(os.environ.get("CXXFLAGS", ""))
    return [*CXX, *CXX_FLAGS, *user, *defines, *extra, f"-I{CSRC}", *isystem]


def link(target: Path, objects: list[Path], *flags: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    command = [*CXX, "-shared", "-pthread", *map(str, objects), "-o", str(scratch), *flags]
    done = subprocess.run(command)
    if done.returncode != 0:
        raise LinkError(f"status {done.returncode} from: {shlex.join(command)}")
    scratch.replace(target)


def cudart_flags(cuda: Cuda) -> list[str]:
    found = [f"-L{p}" for p in cuda.libraries]
    return [*found, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]


def core_commands(cuda: Cuda | None, reason: str) -> dict[Path, list[str]]:
    """Every source of ep_runtime._C with the command that compiles it."""
    bindings = [p for p in CSRC.glob("bindings*.cpp") if cuda or "_cuda" not in p.stem]
    host = [*bindings, *CSRC.glob("host/*.cpp")]
    commands = dict.fromkeys(sorted(host), host_command(cuda))
    commands[CSRC / "bindings.cpp"] = host_command(cuda, f"-DEP_BUILD_INFO={json.dumps(reason)}")
    if cuda:
        device = [cuda.nvcc, *NVCC_FLAGS, *cuda.gencode, "-DEP_WITH_CUDA=1", f"-I{CSRC}"]
        commands |= dict.fromkeys(sorted(CSRC.glob("cuda/*.cu")), device)
    return commands


def device_linked(source: Path, cuda: Cuda, wheel: Path) -> list[Path]:
    """A source whose device code is linked with NVSHMEM's: its object and the device link's."""
    flags = [*NVCC_FLAGS, *cuda.gencode, "-rdc=true"]
    include = [f"-I{CSRC}", "-isystem", str(wheel / "include")]
    built = compile_one(source, [cuda.nvcc, *flags, *include])
    linked = built.with_suffix(".device.o")
    scratch = linked.with_suffix(f".{os.getpid()}.o")
    command = [cuda.nvcc, *cuda.gencode, "-Xcompiler=-fPIC", "-dlink", str(built)]
    command += [f"-L{wheel / 'lib'}", "-lnvshmem_device", "-o", str(scratch)]
    done = subprocess.run(command)
    if done.returncode != 0:
        raise LinkError(f"status {done.returncode} from: {shlex.join(command)}")
    scratch.replace(linked)
    return [built, linked]


class BuildPython(build_py):
    """Starts from an empty folder: a wheel must not hold files that an earlier build left there."""

    def run(self) -> None:
        packed = Path(self.build_lib).resolve() / "ep_runtime"
        if not self.editable_mode and packed != ROOT / "ep_runtime":
            shutil.rmtree(packed, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Compiles with explicit commands: the interpreter's own build flags are not wanted here."""

    def run(self) -> None:
        if not (CSRC / "bindings.cpp").exists():
            raise SystemExit(
                f"ep_runtime: {CSRC / 'bindings.cpp'} is not there: these sources are not whole;"
                " build from a checkout, or from a newer sdist"
            )
        if shutil.which(CXX[0]) is None:
            raise SystemExit(
                f"ep_runtime: no program {CXX[0]!r}; install a C++20 compiler or set CXX"
            )
        max_jobs()  # told before anything is compiled
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # an optional extension that fails must not leave an old one
        cuda, reason = find_cuda()
        if ext.name == "ep_runtime._nvshmem":
            assert cuda is not None, "the extension is listed only when there is an nvcc"
            self.build_nvshmem(target, cuda)
            return
        commands = core_commands(cuda, reason)
        with ThreadPoolExecutor(max_workers=max_jobs()) as pool:
            objects = list(pool.map(compile_one, commands.keys(), commands.values()))
        link(target, objects, *(cudart_flags(cuda) if cuda else ["-lrt"]))
        what = f"host and CUDA backends (sm_{', sm_'.join(cuda.archs)})" if cuda else "host backend"
        say(f"built {ext.name}: {what}; {reason}")

    def build_nvshmem(self, target: Path, cuda: Cuda) -> None:
        wheel = find_wheel_directory("nvidia", "nvshmem")
        assert wheel is not None, "the extension is listed only when the wheel is there"
        host = host_command(cuda, f"-isystem{wheel / 'include'}")
        built = [compile_one(CSRC / "nvshmem_bindings.cpp", host)]
        built += device_linked(CSRC / "nvshmem_puts.cu", cuda, wheel)
        runpath = [f"-Wl,-rpath,{p}" for p in ("$ORIGIN/../nvidia/nvshmem/lib", wheel / "lib")]
        host_library = [f"-L{wheel / 'lib'}", "-l:libnvshmem_host.so.3"]
        # The archive's symbols stay in here: torch's own NVSHMEM module has the same ones.
        device_library = [str(wheel / "lib" / "libnvshmem_device.a"), "-Wl,--exclude-libs,ALL"]
        runtime = [*cudart_flags(cuda), "-lcudadevrt"]
        link(target, built, *device_library, *host_library, *runpath, *runtime)
        say(f"built ep_runtime._nvshmem against {wheel}")


def extensions() -> list[Extension]:
    """Sources are given to the compiler by BuildNative; here only the names count."""
    listed = [Extension("ep_runtime._C", sources=[])]
    cuda, reason = find_cuda()
    if cuda is None:
        say(f"no ep_runtime._nvshmem: {reason}")
    elif find_wheel_directory("nvidia", "nvshmem") is None:
        say("no ep_runtime._nvshmem: the wheel nvidia-nvshmem-cu13 is not installed")
    else:
        listed.append(Extension("ep_runtime._nvshmem", sources=[], optional=True))
    return listed


setup(
    packages=[
        "ep_runtime",
        "ep_runtime.bench",
        "ep_runtime.bench.peers",
        "ep_runtime.graphs",
        "ep_runtime.integrations",
        "ep_runtime.integrations.deep_ep",
        "ep_runtime.integrations.deep_ep.importable",
        "ep_runtime.integrations.deep_ep.importable.deep_ep",
        "ep_runtime.integrations.deep_ep.importable.deep_ep_cpp",
        "ep_runtime.lm",
        "ep_runtime.memory",
        "ep_runtime.normal",
        "ep_runtime.scheduler",
    ],
    package_dir={
        "ep_runtime": "ep_runtime",
        "ep_runtime.graphs": "graphs",
        "ep_runtime.integrations": "integrations",
    },
    package_data={
        "ep_runtime": ["py.typed", "*.pyi"],
        "ep_runtime.lm": ["checkpoint.safetensors"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
