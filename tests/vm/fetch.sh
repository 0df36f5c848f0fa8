#!/usr/bin/env bash
# Fills the VM cache: a QEMU with vfio-user-pci, two Debian kernels, a small userland, and a
# guest image for each kernel. Installs nothing on the host and needs no root.
#
#   tests/vm/fetch.sh            make what is missing
#   tests/vm/fetch.sh --check    exit 1 and say what is missing, download nothing
#
# MVGPU_CACHE            the cache folder (default: XDG_CACHE_HOME/mvgpu or ~/.cache/mvgpu)
# MVGPU_DEBIAN_MIRROR    the Debian mirror (default: the one in the host's apt sources)
#
# Every part is made in a temporary folder and renamed into place with its stamp file .done
# inside; downloads that are complete survive an interrupted run in CACHE/apt.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${MVGPU_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mvgpu}
[[ $cache == /* ]] || cache=$PWD/$cache
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
kernels=(6.1 6.12)
format=1  # part of every stamp: raise it when the layout of the cache changes
total=4
step=0
step_start=$SECONDS
ticker=

say() { printf 'fetch: %s\n' "$*" >&2; }
die() { printf 'fetch: error: %s\n' "$*" >&2; exit 1; }

suite_of() { case $1 in 6.1) echo bookworm ;; 6.12) echo trixie ;; esac; }

# --- what is there -----------------------------------------------------------------------

part_is_there() { if [[ $1 == qemu ]]; then have_qemu; else done_stamp "$1"; fi; }

done_stamp() { [[ -f $cache/$1/.done && $(<"$cache/$1/.done") == "$format"* ]]; }

have_qemu() {
  done_stamp qemu || return 1
  local used
  used=$(<"$cache/qemu/program")
  [[ -x $used ]]
}

missing_parts() {
  local part
  for part in qemu "${kernels[@]/#/kernels/}" userland; do
    part_is_there "$part" || echo "$part"
  done
}

missing_guests() {
  for version in "${kernels[@]}"; do
    "$here/build_initramfs.sh" --check "$version" || echo "guest/$version"
  done
}

# --- steps -------------------------------------------------------------------------------

begin() {
  step=$((step + 1))
  step_start=$SECONDS
  say "[$step/$total] $*"
  tick "$*" 9>&- &
  ticker=$!
}

finish() {
  stop_ticker
  say "[$step/$total] $* ($((SECONDS - step_start)) s)"
}

# A line every ten seconds; its sleep holds neither the lock nor the terminal when it is left over.
tick() {
  while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    say "[$step/$total] $1 ... $((SECONDS - step_start)) s"
  done
}

stop_ticker() {
  [[ -n $ticker ]] || return 0
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  ticker=
}
trap stop_ticker EXIT

# Makes CACHE/NAME from FUNCTION, which fills the folder given to it.
make_part() {
  local name=$1 fill=$2
  if part_is_there "$name"; then
    step=$((step + 1))
    return
  fi
  begin "$name"
  local temp
  temp=$(mktemp -d "$cache/tmp.part.XXXXXX")
  chmod 755 "$temp"
  "$fill" "$temp" "${name##*/}"
  rm -rf "${cache:?}/$name"
  mkdir -p "$(dirname "$cache/$name")"
  mv "$temp" "$cache/$name"
  finish "$name: $(sed -n '1s/^[^ ]* //p' "$cache/$name/.done")"
}

stamp() { printf '%s %s\n' "$format" "$2" >"$1/.done"; }  # stamp FOLDER TEXT

# --- Debian packages, through a private apt that knows one suite -------------------------

apt_prepare() {  # apt_prepare SUITE: sources and indexes in CACHE/apt/SUITE
  local suite=$1
  local root=$cache/apt/$suite
  local mirror=${MVGPU_DEBIAN_MIRROR:-}
  [[ -n $mirror ]] || mirror=$("$here/mirror.py")
  [[ ! -f $root/ready || $(<"$root/ready") != "$mirror" ]] || return 0
  mkdir -p "$root"/{etc/apt.conf.d,etc/preferences.d,lists/partial,archives/partial,deb}
  : >"$root/status"
  {
    echo "deb [signed-by=$keyring] $mirror $suite main"
    [[ $suite != trixie ]] || echo "deb [signed-by=$keyring] $mirror trixie-backports main"
  } >"$root/etc/sources.list"
  {
    # Of the host's settings only the ways through the network are kept.
    apt-config dump | grep -E '^Acquire::(http|https|Retries|Force|Check-Valid)' || true
    echo "Dir::Etc \"$root/etc\";"
    echo 'Dir::Etc::sourcelist "sources.list";'
    echo 'Dir::Etc::sourceparts "/dev/null";'
    echo "Dir::Etc::parts \"$root/etc/apt.conf.d\";"
    echo "Dir::State \"$root\";"
    echo "Dir::State::lists \"$root/lists\";"
    echo "Dir::State::status \"$root/status\";"
    echo "Dir::Cache \"$root\";"
    echo "Dir::Cache::archives \"$root/archives\";"
    echo 'APT::Architecture "amd64";'
    echo 'APT::Architectures { "amd64"; };'
    echo 'APT::Sandbox::User "root";'
    echo 'APT::Install-Recommends "false";'
    echo 'APT::Update::Error-Mode "any";'
    echo 'Acquire::Languages "none";'
    echo 'Debug::NoLocking "true";'  # CACHE/lock is held
  } >"$root/apt.conf"
  apt_do "$suite" apt-get -qq update
  echo "$mirror" >"$root/ready"
}

apt_do() {  # apt_do SUITE COMMAND...
  local suite=$1 log=$cache/apt/$1/log
  shift
  if ! APT_CONFIG=$cache/apt/$suite/apt.conf "$@" >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    die "$suite: '$*' failed (log: $log); check the network, or set MVGPU_DEBIAN_MIRROR to a mirror that has $suite"
  fi
}

# Unpacks PACKAGES and all that they depend on into FOLDER.
apt_unpack_closure() {  # apt_unpack_closure SUITE FOLDER APT-OPTIONS-AND-PACKAGES...
  local suite=$1 folder=$2
  shift 2
  apt_prepare "$suite"
  rm -f "$cache/apt/$suite/deb"/*
  apt_do "$suite" apt-get -y -qq --print-uris install "$@"
  local names
  names=$(sed -n "s/^'[^']*' \([^ ]*\.deb\) .*/\1/p" "$cache/apt/$suite/log")
  apt_do "$suite" apt-get -y -qq --download-only install "$@"
  local name
  for name in $names; do
    dpkg-deb --fsys-tarfile "$cache/apt/$suite/archives/$name" |
      tar -x -C "$folder" --no-same-owner --keep-directory-symlink --exclude=./usr/share/{doc,man,locale,lintian}
  done
}

fill_qemu() {
  local folder=$1 program version
  if program=$(host_qemu); then
    printf '#!/bin/sh\nexec %q "$@"\n' "$program" >"$folder/run"
  else
    mkdir "$folder/root"
    apt_unpack_closure trixie "$folder/root" -t trixie-backports qemu-system-x86
    write_qemu_wrapper "$folder/run"
    program=$cache/qemu/run
  fi
  chmod 755 "$folder/run"
  echo "$program" >"$folder/program"
  # No pipe into grep -q: it would end QEMU early.
  [[ $("$folder/run" -device help 2>"$folder/error") == *'"vfio-user-pci"'* ]] ||
    die "qemu: $folder/run has no vfio-user-pci device ($(tail -n 1 "$folder/error")); QEMU 10.1 or later is needed"
  rm "$folder/error"
  version=$("$folder/run" --version | sed -n '1s/.*version \([^ ]*\).*/\1/p')
  stamp "$folder" "QEMU $version"
}

host_qemu() {
  local program
  program=$(command -v qemu-system-x86_64) || return 1
  [[ $("$program" -device help 2>/dev/null) == *'"vfio-user-pci"'* ]] || return 1
  echo "$program"
}

# QEMU and its libraries are newer than the host's: they run through their own loader, so
# that sockets and images keep their host paths.
write_qemu_wrapper() {
  cat >"$1" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
multi=x86_64-linux-gnu
loader=$root/usr/lib64/ld-linux-x86-64.so.2
[ -e "$loader" ] || loader=$root/lib64/ld-linux-x86-64.so.2
QEMU_MODULE_DIR=$root/usr/lib/$multi/qemu
export QEMU_MODULE_DIR
exec "$loader" --argv0 qemu-system-x86_64 \
  --library-path "$root/usr/lib/$multi:$root/lib/$multi:$root/usr/lib/$multi/pulseaudio" \
  "$root/usr/bin/qemu-system-x86_64" \
  -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@"
WRAPPER
}

fill_kernel() {  # the generic image: the cloud one has no DRM
  local folder=$1 version=$2 suite package deb release
  suite=$(suite_of "$version")
  apt_prepare "$suite"
  apt_do "$suite" apt-cache depends linux-image-amd64
  package=$(sed -n 's/^ *Depends: \(linux-image-[0-9].*-amd64\)$/\1/p' "$cache/apt/$suite/log" | head -n 1)
  [[ $package == linux-image-"$version".* ]] ||
    die "kernel $version: $suite offers '${package:-nothing}' instead; change suite_of in tests/vm/fetch.sh"
  release=${package#linux-image-}
  deb=$cache/apt/$suite/deb
  rm -f "$deb"/*
  # shellcheck disable=SC2016  # $1 and $2 belong to the inner shell
  apt_do "$suite" sh -c 'cd "$1" && apt-get -qq download "$2"' sh "$deb" "$package"
  mkdir "$folder/raw"
  dpkg-deb --fsys-tarfile "$deb"/*.deb | tar -x -C "$folder/raw" --no-same-owner --wildcards \
    --exclude='*/kernel/drivers/net' --exclude='*/kernel/drivers/media' --exclude='*/kernel/sound' \
    --exclude='*/kernel/fs' --exclude='*/kernel/net' --exclude='./usr/share'
  mkdir "$folder/lib"
  mv "$folder/raw/boot/vmlinuz-$release" "$folder/vmlinuz"
  if [[ -d $folder/raw/usr/lib/modules ]]; then mv "$folder/raw/usr/lib/modules" "$folder/lib/"
  else mv "$folder/raw/lib/modules" "$folder/lib/"; fi
  rm -rf "$folder/raw"
  depmod -b "$folder" "$release" 2>/dev/null || die "kernel $version: depmod -b $folder $release failed"
  echo "$release" >"$folder/release"
  stamp "$folder" "$package $(dpkg-deb -f "$deb"/*.deb Version)"
}

fill_userland() {
  apt_unpack_closure bookworm "$1" busybox-static libdrm-tests
  [[ -x $1/bin/busybox && -x $1/usr/bin/modetest ]] ||
    die "userland: bin/busybox or usr/bin/modetest missing in $1; Debian has moved them, change fill_userland in tests/vm/fetch.sh"
  stamp "$1" "busybox and modetest of bookworm"
}

# --- main --------------------------------------------------------------------------------

check_tools() {
  local tool names=()
  for tool in apt-get cpio dpkg-deb depmod flock gzip modprobe python3 tar xz; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || names+=("$tool")
  done
  [[ -e $keyring ]] || names+=("$keyring")
  [[ ${#names[@]} == 0 ]] || die "not found on this host: ${names[*]}; install the packages in tests/vm/packages.txt"
  [[ $(dpkg --print-architecture) == amd64 ]] || die "this host is $(dpkg --print-architecture); the guests need amd64"
}

take_lock() {
  mkdir -p "$cache"
  exec 9>"$cache/lock"
  flock -n 9 || { say "another run fills $cache; waiting for it"; flock 9; }
  rm -rf "$cache"/tmp.part.*
}

fetch_parts() {
  local missing
  missing=$(missing_parts | tr '\n' ' ')
  [[ -n $missing ]] || return 0
  say "will put into $cache: ${missing% }"
  say "  Debian packages, about 240 MB to download, 420 MB on disk (800 MB while this runs); nothing is installed on this host"
  make_part qemu fill_qemu
  for version in "${kernels[@]}"; do make_part "kernels/$version" fill_kernel; done
  make_part userland fill_userland
  rm -rf "$cache/apt"
}

main() {
  PATH=$PATH:/usr/sbin:/sbin
  export PATH
  local missing
  missing=$( { missing_parts; missing_guests; } | tr '\n' ' ')
  if [[ -z $missing ]]; then
    say "nothing to do: $cache has $(sed -n '1s/^[^ ]* //p' "$cache/qemu/.done"), kernels ${kernels[*]} and their guests"
    return
  fi
  [[ ${1:-} != --check ]] || die "$cache lacks: ${missing% }; run tests/vm/fetch.sh"
  check_tools
  take_lock
  fetch_parts
  for version in "${kernels[@]}"; do "$here/build_initramfs.sh" "$version"; done
  say "done in $SECONDS s, $(du -sh "$cache" | cut -f1) in $cache"
}

case ${1:-} in
  '' | --check) main "$@" ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
esac
