#!/bin/bash
# The kernels of every instruction set against the scalar variant's results, bit for bit, through runner.c:
#   native, with the address and undefined behaviour sanitizers, every variant that this processor runs;
#   VNNI with its instructions emulated, where the processor lacks it;
#   NEON and scalar of AArch64 under qemu-user, where the cross compiler and the emulator are installed.
# The installed kernels still prefetch: a compiler may take that for nothing, and no result would tell.
# And the data plane (gang and program) through stress.c and the flash reader through flash_stress.c, under the thread
# sanitizer and under the other two.
# Needs the python that has pi2rt installed on PATH. Exit status nonzero on any difference or report.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/kernels
source=$root/cython_kernels
folders=(kernels system flash plane) # of the C files, and of what they include
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
read -ra compiler <<<"${CC:-cc}" # may be "ccache gcc"
machine=$(uname -m)
cases=$work/cases.bin

has() { grep -qw "$1" /proc/cpuinfo; }

common=(-std=gnu11 -ffp-contract=off -Wall -Wextra -Werror "${folders[@]/#/-I$source/}" -I"$here")
# Calls instead of inlined checks, or the compiler takes minutes; null is found by the address sanitizer anyway.
checks=(-O1 -g1 -fno-var-tracking -fsanitize=address --param asan-instrumentation-with-call-threshold=0
  -fsanitize=undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all)
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
declare -A isa=([scalar]="" [avx2]="-mavx2 -mfma -mf16c" [avx512]=$avx512 [avx512vnni]="$avx512 -mavx512vnni"
  [neon]="-march=armv8.2-a+dotprod")

# build NAME COMPILER "FLAGS" VARIANT...: $work/NAME/runner with these variants
build() {
  local name=$1 with=$2 flags=$3 jobs=() status=0 variant
  shift 3
  mkdir -p "$work/$name"
  for variant in "$@"; do echo "#define PI2_HAVE_$variant 1"; done >"$work/$name/variants.h"
  # shellcheck disable=SC2086  # flags are words
  for variant in "$@"; do
    $with "${common[@]}" $flags ${isa[$variant]} -c "$source/kernels/kernels_$variant.c" -o "$work/$name/$variant.o" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || status=1; done
  # shellcheck disable=SC2086
  [ $status = 0 ] && $with "${common[@]}" $flags -I"$work/$name" "$here/runner.c" \
    "$source"/kernels/{dispatch,repack,bundles}.c "$work/$name"/*.o -lm -o "$work/$name/runner"
}

native() {
  local variants=(scalar)
  case $machine in
    x86_64)
      has avx2 && variants+=(avx2)
      has avx512bw && variants+=(avx512)
      has avx512_vnni && variants+=(avx512vnni)
      ;;
    aarch64) has asimddp && variants+=(neon) ;;
  esac
  build native "${compiler[*]}" "${checks[*]}" "${variants[@]}" && "$work/native/runner" "$cases"
}

vnni() {
  isa[avx512vnni]="$avx512 -include emulate_vnni.h"
  build vnni "${compiler[*]}" -O2 scalar avx512vnni && "$work/vnni/runner" "$cases" avx512vnni
}

arm() {
  build arm aarch64-linux-gnu-gcc "-O3 -static" scalar neon &&
    qemu-aarch64-static -cpu max "$work/arm/runner" "$cases"
}

# What a thread that assists reads of a run that is over may change under it, and is never used (assist.h).
for function in assist_linear assist_ffn assist_head assist; do echo "race:$function"; done >"$work/suppressions"

# stress NAME STEPS FLAGS...: with the scalar kernels alone, which every sanitizer sees through
stress() {
  local name=$1 steps=$2
  shift 2
  mkdir -p "$work/$name"
  echo "#define PI2_HAVE_scalar 1" >"$work/$name/variants.h"
  "${compiler[@]}" "${common[@]}" "$@" -DPI2_SUSPEND=suspend -I"$work/$name" "$here/stress.c" \
    "$source"/kernels/{dispatch,repack,bundles,kernels_scalar}.c "$source"/{system,flash,plane}/*.c \
    -lm -pthread -o "$work/$name/stress" &&
    (cd "$work" && TSAN_OPTIONS=suppressions=$work/suppressions "$name/stress" "$steps")
}

reader=("$source"/flash/{flash,flash_uring}.c "$source/plane/gang.c" "$source"/system/{pages,system_calls}.c)
# flash NAME READS FLAGS...
flash() {
  local name=$1 reads=$2
  shift 2
  "${compiler[@]}" "${common[@]}" "$@" "$here/flash_stress.c" "${reader[@]}" \
    -pthread -o "$work/flash_$name" && (cd "$work" && "./flash_$name" "$reads")
}

# Under the emulator there is no io_uring: this is about the other backend, and about falling back to it.
flash_arm() {
  aarch64-linux-gnu-gcc "${common[@]}" -O2 -static "$here/flash_stress.c" \
    "${reader[@]}" -pthread \
    -o "$work/flash_arm" && (cd "$work" && qemu-aarch64-static -cpu max ./flash_arm 500)
}

prefetches() {
  local built count
  # As the loader found it, wherever the package is installed or built.
  built=$(python -P -c 'from pi2rt.cython_kernels.kernels import native; print(open("/proc/self/maps").read())' |
    grep -o '/[^ ]*/libpi2rt_plane\.so' | sort -u) || return 1
  count=$(objdump -d "$built" | grep -cE '\s(prefetch[a-z0-9]*|prfm)\s')
  echo "$count instructions in $(basename "$built")"
  [ "$count" -ge 200 ] # at least five for each of some forty products; 12 were left when they had been removed
}

stages=()
# start TITLE COMMAND...: in the background; what it says is shown below
start() {
  local title=$1 number=${#stages[@]}
  shift
  ("$@") >"$work/stage.$number" 2>&1 &
  stages+=("$!:$title")
}

(cd "$work" && python -P -c 'import sys; sys.path.append(sys.argv[1])
from pathlib import Path
from tests.kernels.make_cases import main
main(Path(sys.argv[2]))' "$root" "$cases") || { echo "FAILED: no cases"; exit 1; }

start "prefetch instructions" prefetches
start "$machine, address and undefined behaviour sanitizers" native
[ "$machine" = x86_64 ] && has avx512bw && ! has avx512_vnni && start "x86_64, VNNI emulated" vnni
if [ "$machine" != aarch64 ]; then
  if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64-static >/dev/null; then
    start "aarch64 under qemu" arm
    start "aarch64 under qemu, flash reader" flash_arm
  else
    start "aarch64" echo "not run: it takes aarch64-linux-gnu-gcc and qemu-aarch64-static"
  fi
fi
start "data plane, thread sanitizer" stress thread 80 -O1 -g1 -fsanitize=thread
start "data plane, address and undefined behaviour sanitizers" stress address 30 "${checks[@]}"
start "flash reader, thread sanitizer" flash thread 2000 -O1 -g1 -fsanitize=thread
start "flash reader, address and undefined behaviour sanitizers" flash address 2000 "${checks[@]}"

failed=0
for i in "${!stages[@]}"; do
  wait "${stages[$i]%%:*}"
  status=$?
  echo "-- ${stages[$i]#*:}"
  cat "$work/stage.$i"
  if [ $status != 0 ]; then
    echo "FAILED: ${stages[$i]#*:}"
    failed=1
  fi
done
exit $failed
