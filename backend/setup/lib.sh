# Functions for backend/demo.sh and tests/run.sh; sourced, not run. Expects `set -euo pipefail`.

mvgpu_say() { printf '\n==> %s\n' "$*"; }
mvgpu_die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# mvgpu_install LIST...: installs the Debian packages of the lists that are missing, after saying which.
mvgpu_install() {
  local list package missing=()
  for list in "$@"; do
    while read -r package _; do
      [[ -z "$package" || "$package" == \#* ]] && continue
      dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done <"$list"
  done
  if ((${#missing[@]} == 0)); then return; fi
  mvgpu_say "installing ${#missing[@]} Debian packages: ${missing[*]}"
  [[ $(id -u) == 0 ]] || mvgpu_die "these packages are missing and only root can install them: apt-get install ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -o DPkg::Lock::Timeout=600 update -q
  apt-get -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends "${missing[@]}"
}

# mvgpu_build PRESET [CMAKE_OPTION...] [-- TARGET...]: configures and builds; nothing to do is quick.
mvgpu_build() {
  local preset=$1 options=() targets=()
  shift
  while (($# > 0)) && [[ $1 != -- ]]; do options+=("$1"); shift; done
  if (($# > 0)); then shift; targets=(--target "$@"); fi
  mvgpu_say "building the $preset preset in build/$preset"
  cmake --preset "$preset" "${options[@]}" >"$MVGPU_TOP/build/$preset.configure.log" 2>&1 || {
    tail -n 30 "$MVGPU_TOP/build/$preset.configure.log" >&2
    mvgpu_die "configuring $preset failed; the whole log is build/$preset.configure.log"
  }
  cmake --build --preset "$preset" "${targets[@]}"
}
