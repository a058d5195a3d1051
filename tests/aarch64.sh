#!/usr/bin/env bash
# Compiles the CPU kernels for aarch64 and runs their tests in an emulator: one command, for a
# machine of another kind. Arguments go to pytest. A half of the tests of CPU kernels takes about
# half an hour; `-k odd_sizes` takes five minutes.
#
#   PYTHON   the Python that apt has for arm64 (3.11)
#   COMPILER (aarch64-linux-gnu-g++)
#
# It needs Debian's packages g++-aarch64-linux-gnu and qemu-user, arm64's package lists (as root:
# dpkg --add-architecture arm64 && apt-get update), and a python3 with torch and pip.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-3.11}
compiler=${COMPILER:-aarch64-linux-gnu-g++}
# The last one whose wheel for aarch64 has no CUDA in it.
torch=torch==2.10.0
work=$root/build/aarch64
system=$work/system site=$work/site
mkdir -p "$work"/{packages,objects} "$system" "$site"

if [[ ! -e $system/usr/bin/python$python ]]; then
    cd "$work/packages"
    apt-get download {,lib}python"$python"{,-minimal}:arm64 libpython"$python"-{stdlib,dev}:arm64 \
        {libc6,libgcc-s1,libstdc++6,libgomp1,zlib1g,libexpat1,libssl3,libffi8,libbz2-1.0}:arm64 \
        {liblzma5,libuuid1,libsqlite3-0,libncursesw6,libtinfo6,libcrypt1}:arm64
    for package in *.deb; do dpkg -x "$package" "$system"; done
fi
if [[ ! -e $site/torch ]]; then
    # pip would look for what torch needs on this machine.
    install=(python3 -m pip install -q --target "$site" --only-binary=:all: --python-version "$python")
    install+=(--platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64)
    "${install[@]}" numpy pytest pytest-timeout hypothesis \
        typing-extensions sympy networkx jinja2 fsspec filelock
    "${install[@]}" --no-deps "$torch"
fi

cd "$root"
rm -rf "$site/resnest_fused" "$work"/objects/*
cp -r resnest_fused "$site/"
mapfile -t facts < <(python3 - "$work" <<'PYTHON'
import pathlib
import runpy
import sys

runpy.run_path("csrc/generate_ops.py")["write"](pathlib.Path(sys.argv[1], "ops_generated.h"))
print(runpy.run_path("resnest_fused/backends/binary.py")["hash_sources"](pathlib.Path.cwd()))
print(" ".join(runpy.run_path("setup.py", run_name="setup")["CXX_FLAGS"]))
PYTHON
)
flags=(-fPIC -DTORCH_TARGET_VERSION=0x020a000000000000 -Icsrc "-I$work")
for folder in "$site"/torch/include{,/torch/csrc/api/include} \
    "$system/usr/include/"{,aarch64-linux-gnu/}"python$python"; do
    flags+=(-isystem "$folder")
done
flags+=(-idirafter "$system/usr/include")
export compiler objects=$work/objects
printf '%s\n' csrc/{,cpu/,cuda/}*.cpp | xargs -P "$(nproc)" -I{} bash -c '
    source=$1 && shift
    "$compiler" "$@" -c "$source" -o "$objects/${source//\//_}.o"' _ {} ${facts[1]} "${flags[@]}" \
    '-DRESNEST_FUSED_VERSION="aarch64"' "-DRESNEST_FUSED_SOURCES=\"${facts[0]}\"" \
    '-DRESNEST_FUSED_TORCH_VERSION="2.10.0"' '-DRESNEST_FUSED_CXX_FLAGS=""' \
    '-DRESNEST_FUSED_CUDA_STATUS=""' '-DRESNEST_FUSED_CUDA_ARCHS=""'
"$compiler" -shared "$objects"/*.o -L"$site/torch/lib" -ltorch_cpu \
    -Wl,--unresolved-symbols=ignore-all \
    -o "$site/resnest_fused/_C.cpython-${python/./}-aarch64-linux-gnu.so"

libraries=$system/usr/lib/aarch64-linux-gnu:$system/lib/aarch64-linux-gnu:$site/torch/lib
PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1 \
    qemu-aarch64 -L "$system" -E LD_LIBRARY_PATH="$libraries" "$system/usr/bin/python$python" -P \
    -m pytest -p no:cacheprovider --timeout 1800 tests/test_cpu_kernels.py tests/test_op.py "$@"
