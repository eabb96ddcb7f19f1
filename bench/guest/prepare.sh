#!/bin/bash
# Makes what a guest boots: OUT/initrd, of the directory FILES, of programs of this host, and of modules of the kernel. The
# script that the guest runs is read from stdin. On stdout are the path of the kernel and the arguments of qemu for its
# accelerator, a line each. It is run in the root of this module.
#
#   prepare.sh OUT FILES "COMMAND=PACKAGE..." "MODULE..."
set -euo pipefail
# shellcheck source=scripts/guestlib
. scripts/guestlib
guest_name=guestlib
out=$1 files=$2 programs=$3 modules=$4
exec 3>&1 >&2
guest_begin
# shellcheck disable=SC2086 # they are words
guest_need $programs
guest_kernel
guest_root "$run/root"
for program in $programs; do
	guest_program "$run/root" "${program%%=*}"
done
cp -a "$files/." "$run/root"
# shellcheck disable=SC2086
guest_initrd "$out/initrd" "$run/root" $modules
guest_accel "$out/initrd"
printf '%s\n' "$vmlinuz" "${accel[@]}" >&3
