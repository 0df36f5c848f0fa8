#!/usr/bin/env bash
# Installs what is missing, builds and runs every test; closes with ctest's summary.
#
#   tests/run.sh            everything, long things in their short form
#   tests/run.sh --long     soak, fuzz and model checks in their long form
#   tests/run.sh --quick    release preset only, without the guests
set -euo pipefail

MVGPU_TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$MVGPU_TOP"
source backend/setup/lib.sh

long= quick=
for argument in "$@"; do
  case $argument in
    --long) long=1 ;;
    --quick) quick=1 ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) mvgpu_die "unknown option $argument; --long and --quick are known" ;;
  esac
done
[[ -z $long ]] || export MVGPU_MODEL_STEPS=1000000 MVGPU_FUZZ_ROUNDS=200000 MVGPU_LEDGER_KILLS=5000 \
  MVGPU_HOSTILE_REQUESTS=5000000 MVGPU_MESSAGES=1000000

options=(-DMVGPU_WERROR=ON -DMVGPU_REQUIRE_VULKAN=ON) # what is left out would be tests that nobody misses
jobs=$(nproc)
mkdir -p build
if [[ -n $quick ]]; then
  mvgpu_install backend/setup/packages.txt tests/packages.txt
else
  mvgpu_install backend/setup/packages.txt tests/packages.txt tests/vm/packages.txt
  mvgpu_say "fetching what the test guests need (QEMU, kernels, a userland)"
  tests/vm/fetch.sh
  for preset in asan-ubsan tsan; do
    mvgpu_build "$preset" "${options[@]}"
    mvgpu_say "unit, conformance and model tests under $preset"
    ctest --preset "$preset" -j "$jobs" -LE 'e2e' --quiet -O "build/$preset.ctest.log" || {
      # What is said about the tests that failed, without the many that passed.
      grep -avE '^ +Start +[0-9]+:|Test +#[0-9]+: .* Passed ' "build/$preset.ctest.log" | tail -n 200
      mvgpu_die "tests failed under $preset; the whole log is build/$preset.ctest.log"
    }
    tail -n 4 "build/$preset.ctest.log"
  done
  # clang finds what g++ does not: locks that are not held where the annotations ask for them.
  mvgpu_build clang "${options[@]}" -DMVGPU_BUILD_TESTS=OFF
fi

mvgpu_build release "${options[@]}"
if [[ -n $quick ]]; then
  mvgpu_say "all tests but the guests, release preset"
  exec ctest --preset release -j "$jobs" -LE 'e2e'
fi
mvgpu_say "all tests, release preset, guests included"
exec ctest --preset release -j "$jobs"
