#!/usr/bin/env bash
# Builds CACHE/guest/VERSION/initramfs.gz from the parts that fetch.sh made and tests/vm/init.
#
#   tests/vm/build_initramfs.sh VERSION                   build if an input has changed
#   tests/vm/build_initramfs.sh --check VERSION           exit 1 if it would build
#   tests/vm/build_initramfs.sh --program FILE VERSION    the same image with FILE, its libraries and
#                                                         VFIO's modules; prints where it is
#   tests/vm/build_initramfs.sh --host IMAGE VERSION FILE...
#                                                         writes IMAGE: the same image with the cache's
#                                                         QEMU, VFIO's modules, and FILEs in /host
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${MVGPU_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mvgpu}
wanted_modules=(virtio_pci virtio_gpu)
program_modules=(vfio_iommu_type1 vfio-pci)
programs=(modetest proptest vbltest)
PATH=$PATH:/usr/sbin:/sbin

die() { printf 'build_initramfs: error: %s\n' "$*" >&2; exit 1; }

inputs_hash() {
  cat "$here/init" "${BASH_SOURCE[0]}" "$kernel/.done" "$userland/.done" 2>/dev/null | sha256sum | cut -d' ' -f1
}

is_current() { [[ -f $guest/initramfs.gz && -f $guest/stamp && $(<"$guest/stamp") == "$(inputs_hash)" ]]; }

# Copies modules and their dependencies into a folder, unpacked, and lists them in load order.
add_modules() {  # add_modules FOLDER RELEASE MODULE...
  local folder=$1 release=$2 path name
  shift 2
  for module in "$@"; do
    modprobe --show-depends -S "$release" -d "$kernel" "$module"
  done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' >"$folder/paths"
  [[ -s $folder/paths ]] || die "kernel $release: no module files for $* in $kernel"
  while read -r path; do
    name=$(basename "$path")
    case $name in
      *.xz) xz -dc "$path" >"$folder/${name%.xz}" ;;
      *) cp "$path" "$folder/$name" ;;
    esac
    echo "${name%.xz}" >>"$folder/order"
  done <"$folder/paths"
  rm "$folder/paths"
}

# Copies the programs, the loader and the libraries that the loader names for them.
add_programs() {
  local tree=$1 multi=x86_64-linux-gnu program library
  local loader=$userland/lib64/ld-linux-x86-64.so.2
  [[ -e $loader ]] || loader=$userland/usr/lib64/ld-linux-x86-64.so.2
  cp "$userland/bin/busybox" "$tree/bin/"
  cp -L "$loader" "$tree/lib64/"
  for program in "${programs[@]}"; do
    cp "$userland/usr/bin/$program" "$tree/bin/"
    "$loader" --library-path "$userland/usr/lib/$multi:$userland/lib/$multi" --list "$userland/usr/bin/$program" |
      sed -n 's/.* => \(\/[^ ]*\) .*/\1/p'
  done | sort -u | while read -r library; do cp -L "$library" "$tree/lib64/"; done
  mkdir -p "$tree/usr/share"
  cp -r "$userland/usr/share/libdrm" "$tree/usr/share/" 2>/dev/null || true
}

pack() {  # pack TREE FILE: the same tree gives the same bytes
  find "$1" -exec touch -h -d @0 {} +
  (cd "$1" && find . -print0 | LC_ALL=C sort -z | cpio --quiet --null -o -H newc -R 0:0 --reproducible) | gzip -n -6 >"$2"
}

build() {
  local release temp start=$SECONDS
  [[ -f $kernel/release && -f $userland/.done ]] || die "no kernel $version in $cache; run tests/vm/fetch.sh"
  release=$(<"$kernel/release")
  mkdir -p "$cache/guest"
  temp=$(mktemp -d "$cache/tmp.guest.XXXXXX")
  # shellcheck disable=SC2064  # $temp is a local: expand it now
  trap "rm -rf '$temp'" EXIT
  mkdir -p "$temp"/{tree/{bin,lib64,modules,proc,sys,dev,tmp},out}
  add_modules "$temp/tree/modules" "$release" "${wanted_modules[@]}"
  add_programs "$temp/tree"
  install -m 755 "$here/init" "$temp/tree/init"
  pack "$temp/tree" "$temp/out/initramfs.gz"
  mkdir -p "$guest"
  rm -f "$guest/stamp"
  mv "$temp/out/initramfs.gz" "$guest/initramfs.gz"
  inputs_hash >"$temp/out/stamp"
  mv "$temp/out/stamp" "$guest/stamp"
  printf 'build_initramfs: %s: %s, %s modules, %s KiB (%s s)\n' "$version" "$release" "$(wc -l <"$temp/tree/modules/order")" \
    "$(($(stat -c %s "$guest/initramfs.gz") / 1024))" "$((SECONDS - start))" >&2
}

# The host's libraries of a program, its loader included. They lie in a folder of their own: those of
# the userland may be older.
libraries_of() { ldd "$1" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^\t\(\/[^ ]*\) .*/\1/p'; }

# A kernel unpacks archives that follow each other over one another: the program's is put behind.
build_with_program() {
  local file=$1 hash image temp libraries
  mapfile -t libraries < <(libraries_of "$file")
  hash=$(cat "$guest/stamp" "$file" "${libraries[@]}" | sha256sum | cut -c1-16)
  image=$guest/$(basename "$file")-$hash.gz
  if [[ ! -f $image ]]; then
    temp=$(mktemp -d "$cache/tmp.guest.XXXXXX")
    # shellcheck disable=SC2064  # $temp is a local: expand it now
    trap "rm -rf '$temp'" EXIT
    mkdir -p "$temp/tree/program/lib" "$temp/tree/program/modules"
    add_modules "$temp/tree/program/modules" "$(<"$kernel/release")" "${program_modules[@]}"
    cp -L "${libraries[@]}" "$temp/tree/program/lib/"
    install -m 755 "$file" "$temp/tree/program/main"
    strip "$temp/tree/program/main"
    pack "$temp/tree" "$temp/program.gz"
    cat "$guest/initramfs.gz" "$temp/program.gz" >"$temp/image.gz"
    # Those of earlier builds that nobody uses any more.
    find "$guest" -maxdepth 1 -name "$(basename "$file")-*.gz" -mmin +60 -delete
    mv "$temp/image.gz" "$image"
  fi
  echo "$image"
}

# The QEMU of the cache: the one in its folder, or the host's.
qemu_root() { if [[ -d $cache/qemu/root ]]; then echo "$cache/qemu/root"; fi; }

# Every program gets a copy of its loader under its own name: so /proc/PID/comm is the program's.
add_host_program() {  # add_host_program FOLDER NAME FILE LOADER LIBRARY...
  local folder=$1/$2 name=$2 file=$3 loader=$4
  shift 4
  mkdir -p "$folder/lib" "${folder%/*}/bin"
  cp -L "$file" "$folder/program"
  cp -L "$loader" "$folder/$name"
  cp -L "$@" "$folder/lib/"
  printf '#!/bin/sh\nexec /host/%s/%s --library-path /host/%s/lib /host/%s/program %s"$@"\n' \
    "$name" "$name" "$name" "$name" "${arguments:-}" >"${folder%/*}/bin/$name"
  chmod 755 "${folder%/*}/bin/$name"
}

add_host_qemu() {  # add_host_qemu FOLDER
  local root multi=x86_64-linux-gnu arguments="-L /host/firmware " libraries name
  local program loader path
  root=$(qemu_root)
  path=$root/usr/lib/$multi:$root/lib/$multi:$root/usr/lib/$multi/pulseaudio
  program=$root/usr/bin/qemu-system-x86_64
  loader=$root/usr/lib64/ld-linux-x86-64.so.2
  [[ -e $loader ]] || loader=$root/lib64/ld-linux-x86-64.so.2
  [[ -n $root ]] || program=$(<"$cache/qemu/program")
  mapfile -t libraries < <("$loader" --library-path "$path" --list "$program" | sed -n 's/.* => \(\/[^ ]*\) .*/\1/p')
  [[ ${#libraries[@]} != 0 ]] || die "cannot tell the libraries of $program; run tests/vm/fetch.sh"
  add_host_program "$1" qemu-system-x86_64 "$program" "$loader" "${libraries[@]}"
  mkdir "$1/firmware"
  for name in bios-256k.bin kvmvapic.bin multiboot_dma.bin; do
    find -L "$root/usr/share/seabios" "$root/usr/share/qemu" -name "$name" -exec cp {} "$1/firmware/" \; -quit
    [[ -f $1/firmware/$name ]] || die "QEMU's $name is not in $root/usr/share/{seabios,qemu}; run tests/vm/fetch.sh"
  done
}

# Not packed: unpacking costs an emulated processor more than reading.
build_host() {  # build_host IMAGE FILE...
  local image=$1 temp file libraries arguments=
  shift
  temp=$(mktemp -d "$cache/tmp.guest.XXXXXX")
  # shellcheck disable=SC2064  # $temp is a local: expand it now
  trap "rm -rf '$temp'" EXIT
  mkdir -p "$temp/host/modules"
  add_modules "$temp/host/modules" "$(<"$kernel/release")" "${program_modules[@]}"
  add_host_qemu "$temp/host"
  for file in "$@"; do
    mapfile -t libraries < <(libraries_of "$file" 2>/dev/null)
    if [[ ${#libraries[@]} == 0 ]]; then install -m 755 "$file" "$temp/host/"; continue; fi
    add_host_program "$temp/host" "$(basename "$file")" "$file" \
      "$(printf '%s\n' "${libraries[@]}" | grep -m 1 '/ld-linux')" "${libraries[@]}"
  done
  cp "$guest/initramfs.gz" "$image"
  truncate -s %4 "$image"  # a cpio archive begins at a whole word
  (cd "$temp" && find host -print0 | LC_ALL=C sort -z | cpio --quiet --null -o -H newc -R 0:0) >>"$image"
}

check=no
host=
program=
if [[ ${1:-} == --check ]]; then check=yes; shift; fi
if [[ ${1:-} == --program && $# -gt 1 ]]; then program=$2; shift 2; fi
if [[ ${1:-} == --host && $# -gt 3 ]]; then host=$2 version=$3; shift 3; files=("$@"); set -- "$version"; fi
[[ $# == 1 && $1 != -* ]] || { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
version=$1
kernel=$cache/kernels/$version
userland=$cache/userland
guest=$cache/guest/$version

if ! is_current; then
  [[ $check == no ]] || exit 1
  build
fi
if [[ -n $host ]]; then build_host "$host" "${files[@]}"; fi
if [[ -n $program ]]; then build_with_program "$program"; fi
