#!/bin/bash
# The kernels of every instruction set against the scalar variant's results, bit for bit, through runner.c:
#   native, with the address and undefined behaviour sanitizers, every variant that this processor runs;
#   VNNI with vpdpbusd emulated, where the processor lacks it;
#   NEON and scalar of AArch64 under qemu-user, where the cross compiler and the emulator are installed.
# Then the data plane (gang and program) under the thread sanitizer, and under the other two.
# Needs the python that has pi2rt installed on PATH. Exit status nonzero on any difference or report.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/kernels
source=$root/cython_kernels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

fail() {
  echo "FAILED: $*"
  failed=1
}

# as the build does, but for optimisation, which the sanitizers would make slow: calls instead of inlined checks,
# and no checks for null, which the address sanitizer finds by itself
common=(-std=gnu11 -ffp-contract=off -Wall -Wextra -Werror -I"$source" -I"$here")
avx2=(-mavx2 -mfma -mf16c)
avx512=(-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c)
checks=(-O1 -g1 -fno-var-tracking -fsanitize=address --param asan-instrumentation-with-call-threshold=0
  -fsanitize=undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all)

# build NAME COMPILER "FLAGS" ISA=FLAGS...: $work/NAME/runner with these variants
build() {
  local name=$1 compiler=$2 flags=$3 objects=() jobs=() isa status=0
  shift 3
  mkdir -p "$work/$name"
  for isa in "$@"; do echo "#define PI2_HAVE_${isa%%=*} 1"; done >"$work/$name/variants.h"
  for isa in "$@"; do
    # shellcheck disable=SC2086  # flags are words
    $compiler "${common[@]}" $flags ${isa#*=} -c "$source/kernels_${isa%%=*}.c" -o "$work/$name/${isa%%=*}.o" &
    jobs+=($!)
    objects+=("$work/$name/${isa%%=*}.o")
  done
  for job in "${jobs[@]}"; do wait "$job" || status=1; done
  # shellcheck disable=SC2086
  [ $status = 0 ] && $compiler "${common[@]}" $flags -I"$work/$name" "$here/runner.c" "$source/dispatch.c" \
    "$source/repack.c" "${objects[@]}" -lm -o "$work/$name/runner" || { fail "$name does not build"; return 1; }
}

cases=$work/cases.bin
(cd "$work" && python -P -c 'import sys; sys.path.append(sys.argv[1])
from pathlib import Path
from tests.kernels.make_cases import main
main(Path(sys.argv[2]))' "$root" "$cases") || { echo "FAILED: no cases"; exit 1; }

compiler=${CC:-cc}
case $(uname -m) in
  x86_64)
    echo "-- x86-64, address and undefined behaviour sanitizers"
    variants=("scalar=")
    grep -q avx2 /proc/cpuinfo && variants+=("avx2=${avx2[*]}")
    grep -q avx512bw /proc/cpuinfo && variants+=("avx512=${avx512[*]}")
    grep -q avx512_vnni /proc/cpuinfo && variants+=("avx512vnni=${avx512[*]} -mavx512vnni")
    build native "$compiler" "${checks[*]}" "${variants[@]}" &&
      { "$work/native/runner" "$cases" || fail "native variants"; }
    if grep -q avx512bw /proc/cpuinfo && ! grep -q avx512_vnni /proc/cpuinfo; then
      echo "-- x86-64, vpdpbusd emulated"
      build vnni "$compiler" -O2 "scalar=" "avx512vnni=${avx512[*]} -include emulate_vnni.h" &&
        { "$work/vnni/runner" "$cases" avx512vnni || fail "emulated VNNI"; }
    fi
    ;;
  aarch64)
    echo "-- AArch64, address and undefined behaviour sanitizers"
    build native "$compiler" "${checks[*]}" "scalar=" "neon=-march=armv8.2-a+dotprod" &&
      { "$work/native/runner" "$cases" || fail "native variants"; }
    ;;
esac
if [ "$(uname -m)" != aarch64 ]; then
  if command -v aarch64-linux-gnu-gcc qemu-aarch64-static >/dev/null; then
    echo "-- AArch64 under qemu"
    build arm aarch64-linux-gnu-gcc "-O2 -static" "scalar=" "neon=-march=armv8.2-a+dotprod" &&
      { qemu-aarch64-static -cpu max "$work/arm/runner" "$cases" --other-libm || fail "AArch64 variants"; }
  else
    echo "-- AArch64: not run, for want of aarch64-linux-gnu-gcc and qemu-aarch64-static"
  fi
fi

exit $failed
