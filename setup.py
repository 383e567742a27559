"""Builds moe_ops/libsimple_moe.so with ninja, g++ and, where there is one, nvcc.

torch is only a folder of headers and libraries here, never imported: the library uses its stable
ABI alone, so that it can be built in an environment of pip's own and serves every torch from
MIN_TORCH on. Where no nvcc is found, only the CPU half is built.

    CUDA_HOME, CUDA_PATH     the CUDA toolkit; otherwise /usr/local/cuda, otherwise nvcc in PATH
    SIMPLE_MOE_CUDA_ARCHS    what to compile for, "80;90+PTX" unless given: 80 is code for sm_80,
                             90+PTX is code for sm_90 and PTX that any GPU from 9.0 on can compile.
                             With 90 or 90a comes the sm90 backend, whose kernels are sm_90a's alone
    CXX                      the C++ compiler, g++ unless given
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libsimple_moe.so"
MIN_TORCH = (2, 10)
CORES = len(os.sched_getaffinity(0))
CXX = os.environ.get("CXX", "g++")
CXX_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -ffp-contract=off"
# Nobody asks for floating-point exceptions: a choice between two values may compute both, without
# which the compiler makes no vectors of it.
CXX_FLAGS += " -fno-trapping-math"
# No contraction: a kernel says fma where it wants one, so that all of them round alike.
NVCC_FLAGS = (
    "-std=c++20 -O3 --fmad=false -Werror all-warnings -Xptxas -v"
    " -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-ffp-contract=off"
)


def torch_folder() -> Path:
    """Of the installed torch, also from within pip's build environment, which hides it."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parents[1]] if spec and spec.origin else []
    for base in (sys.prefix, sys.base_prefix):
        variables = {"base": base, "platbase": base}
        folders += [Path(sysconfig.get_path(p, vars=variables)) for p in ("purelib", "platlib")]
    folders += map(Path, [*site.getsitepackages(), site.getusersitepackages()])
    for folder in folders:
        version_file = folder / "torch" / "version.py"
        if version_file.exists():
            text = version_file.read_text()
            major, minor = re.search(r"__version__ = ['\"](\d+)\.(\d+)", text).groups()
            if (int(major), int(minor)) < MIN_TORCH:
                sys.exit(f"simple_moe needs torch >= 2.10, {folder} has {major}.{minor}")
            return folder / "torch"
    sys.exit(
        "simple_moe is built against the installed torch, and none was found: install torch >= 2.10"
        " first, and build with --no-build-isolation if it is not in this environment"
    )


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=Path(home, "bin"))
    return shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")


def toolkit_folders(nvcc: str) -> tuple[list[str], list[str]]:
    """(-I, -L) options of nvcc's own toolkit. Asked for, because nvcc may be a script."""
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=True
    ).stderr
    options = {
        name: shlex.split(re.search(rf"^#\$ {name}=(.*)$", dry_run, re.MULTILINE)[1])
        for name in ("INCLUDES", "LIBRARIES")
    }
    return options["INCLUDES"], options["LIBRARIES"]


def cuda_targets() -> dict[str, list[str]]:
    """Architectures and the codes made of each, as nvcc's -gencode has them."""
    targets = {}
    for item in os.environ.get("SIMPLE_MOE_CUDA_ARCHS", "80;90+PTX").split(";"):
        match = re.fullmatch(r"(\d+[af]?)(\+PTX)?", item.strip())
        if not match:
            sys.exit(f"SIMPLE_MOE_CUDA_ARCHS: {item!r} is not like 80, 90a or 90+PTX")
        arch = f"compute_{match[1]}"
        targets[arch] = [f"sm_{match[1]}"] + ([arch] if match[2] else [])
    return targets


def gencode(targets: dict[str, list[str]]) -> list[str]:
    return [f"-gencode=arch={arch},code=[{','.join(codes)}]" for arch, codes in targets.items()]


def ninja_file(version: str) -> str:
    torch = torch_folder()
    nvcc = find_nvcc()
    targets = cuda_targets() if nvcc else {}
    # wgmma is in no code but sm_90a: its kernels are compiled for that alone, wherever there is
    # code for Hopper. With PTX: a driver may be told to compile everything (CUDA_FORCE_PTX_JIT).
    wgmma_kernels = set(ROOT.glob("csrc/cuda/*_sm90_*.cu"))
    hopper = {"compute_90", "compute_90a"} & targets.keys()
    wgmma_targets = {"compute_90a": ["sm_90a", "compute_90a"]} if hopper else {}
    cxx = shlex.split(CXX_FLAGS)
    cxx += ["-Icsrc", "-isystem", str(torch / "include")]
    cxx += ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MIN_TORCH)]
    # Without --no-as-needed libtorch, and with it the CUDA functions, would be left out: nothing
    # refers to it but weak symbols.
    link = ["-shared", "-Wl,-z,defs", "-Wl,--exclude-libs,ALL", f"-L{torch / 'lib'}"]
    link += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    kernels = []
    cu = shlex.split(NVCC_FLAGS)
    if nvcc:
        print(f"simple_moe: building for the CPU and, with {nvcc}, for CUDA", flush=True)
        includes, libraries = toolkit_folders(nvcc)
        cxx += ["-DUSE_CUDA", "-DSIMPLE_MOE_CUDA", *includes]
        # Few kernels take long: with cores to spare, each target of theirs has its own.
        threads = min(len(targets), max(1, CORES // 2))
        cu += ["-Icsrc", f"--threads={threads}"]
        link += [*libraries, "-Wl,--as-needed", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        kernels = set(ROOT.glob("csrc/cuda/**/*.cu"))
        if wgmma_targets:
            cxx += ["-DSIMPLE_MOE_SM90"]
        else:
            kernels -= wgmma_kernels
        sources += ROOT.glob("csrc/cuda/**/*.cpp")
    else:
        print("simple_moe: no nvcc found, building for the CPU ALONE", flush=True)

    codes = json.dumps([code for codes in targets.values() for code in codes])
    info = [f"-DSIMPLE_MOE_VERSION={json.dumps(version)}"]
    info += [f"-DSIMPLE_MOE_CUDA_TARGETS={json.dumps(codes)}"]
    # The report of ptxas (registers, spills) stays beside the object.
    rules = f"""\
builddir = build
cxx_flags = {_shell(cxx)}
cu_flags = {_shell(cu)}
cu_targets = {_shell(gencode(targets))}
link_flags = {_shell(link)}
rule header
  command = {CXX} $cxx_flags -x c++-header -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cxx
  command = {CXX} -Ibuild -include torch_stable.h $cxx_flags $more_flags $
      -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cu
  command = {nvcc} $cu_flags $cu_targets -MD -MF $out.d -c $in -o $out > $out.ptxas.txt 2>&1 $
      || {{ cat $out.ptxas.txt; exit 1; }}
  depfile = $out.d
  deps = gcc
rule link
  command = {CXX} -o $out $in $link_flags
"""
    objects, edges = [], []
    # Where the compiler can't take it compiled, it finds the header itself.
    header = "build/torch_stable.h.gch"
    edges.append(f"build {header}: header csrc/torch_stable.h\n")
    # The kernels take longest: first.
    for source in [*sorted(kernels), *sorted(sources)]:
        name = source.relative_to(ROOT)
        objects.append(f"build/{name}.o")
        rule, needs = ("cu", "") if source in kernels else ("cxx", f" | {header}")
        edges.append(f"build {objects[-1]}: {rule} {name}{needs}\n")
        if source in wgmma_kernels:
            edges.append(f"  cu_targets = {_shell(gencode(wgmma_targets))}\n")
        if name.name == "build_info.cpp":
            edges.append(f"  more_flags = {_shell(info)}\n")
    edges.append(f"build build/{LIBRARY}: link {' '.join(objects)}\n")
    return rules + "".join(edges)


def _shell(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        return "ninja"


class BuildLibrary(build_ext):
    """One file for every Python: no interpreter's tag in its name."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext):
        build = ROOT / "build"
        build.mkdir(exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(self.distribution.get_version()))
        # ninja's own two jobs more than cores made a build on two a quarter longer.
        subprocess.run([ninja(), f"-j{CORES}", "-f", "build/build.ninja"], cwd=ROOT, check=True)
        # Replaced, not overwritten: a process that has it loaded keeps what it has.
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_suffix(".new")
        shutil.copy2(build / LIBRARY, unfinished)
        os.replace(unfinished, output)


# The newest symbols that manylinux_2_34 (PEP 600) allows a library to ask of the system's.
MANYLINUX = "manylinux_2_34"
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (12, 0)}


def is_manylinux(library: Path) -> bool:
    data = library.read_bytes()
    return all(
        tuple(map(int, match[1].split(b"."))) <= newest
        for name, newest in NEWEST.items()
        for match in re.finditer(rb"\0" + name.encode() + rb"_(\d+(?:\.\d+)*)(?=\0)", data)
    )


class Wheel(bdist_wheel):
    """For every Python 3, and every Linux whose system libraries are as new as the symbols used."""

    def get_tag(self):
        platform = super().get_tag()[2]
        library = ROOT / "build" / LIBRARY
        if platform.startswith("linux_") and library.exists() and is_manylinux(library):
            platform = platform.replace("linux", MANYLINUX, 1)
        return "py3", "none", platform


setup(
    ext_modules=[Extension("moe_ops.libsimple_moe", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
