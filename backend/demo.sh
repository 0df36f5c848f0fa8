#!/usr/bin/env bash
# Installs what is missing, builds mvgpu, and runs its main job: a guest draws through the vGPU.
#
#   backend/demo.sh         replays the session of a Debian guest that is built into mvgpu-replay
#   backend/demo.sh --vm    the same live: a real QEMU and a Debian guest, fetched from Debian packages
#
# Both write a picture and an account of every guest page that the device touched, and say where they are.
set -euo pipefail

MVGPU_TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$MVGPU_TOP"
source backend/setup/lib.sh

vm=
for argument in "$@"; do
  case $argument in
    --vm) vm=1 ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) mvgpu_die "unknown option $argument; --vm is known" ;;
  esac
done

output=${MVGPU_DEMO_DIR:-$MVGPU_TOP/build/demo}
programs=$MVGPU_TOP/build/release/bin
mkdir -p build "$output"

if [[ -n $vm ]]; then
  mvgpu_install backend/setup/packages.txt tests/vm/packages.txt
  mvgpu_say "fetching what the guest needs (QEMU, a kernel, a userland)"
  tests/vm/fetch.sh
else
  mvgpu_install backend/setup/packages.txt
fi
mvgpu_build release -- mvgpu-backend mvgpu-replay mvgpu-audit

trace=()
if [[ -n $vm ]]; then
  mvgpu_say "a Debian guest draws through mvgpu-backend, live"
  python3 tests/e2e/live_demo.py "$programs" "$output"
  trace=("$output/session.mvtrace")
  mvgpu_say "the same session again from its trace, without a VMM"
else
  mvgpu_say "replaying the built-in session of a Debian guest"
fi
"$programs/mvgpu-replay" run "${trace[@]}" --screenshot="$output/screen.png" --pages="$output/pages.csv"

mvgpu_say "done"
printf 'picture:       %s\npage account:  %s (one line per guest page: reads, bytes, dma maps, time held)\n' \
  "$output/screen.png" "$output/pages.csv"
