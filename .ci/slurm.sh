#!/usr/bin/env bash
# Installs Slurm's daemons for the tests of tests/launch/slurm, which start a cluster of their own with them; starts
# nothing itself. Ends with 0 if the tests can run here. Without apt or root it says so and ends with 1.
set -uo pipefail
PATH="$PATH:/usr/sbin:/sbin"

complete() {
    local program
    for program in munged slurmctld slurmd sbatch srun scontrol; do
        command -v "$program" > /dev/null || return 1
    done
}

give_up() {
    echo ".ci/slurm.sh: NOT TESTED: the virtual Slurm cluster: $1" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || give_up "its daemons need root"
complete && exit 0
command -v apt-get > /dev/null || give_up "Slurm is not installed, and there is no apt-get here"
export DEBIAN_FRONTEND=noninteractive
packages="slurmctld slurmd slurm-client munge"
# The lists of packages may be old: they are renewed only if that is why it failed.
# shellcheck disable=SC2086
apt-get install -y -q --no-install-recommends $packages > /dev/null 2>&1 \
    || { apt-get update -q > /dev/null 2>&1 && apt-get install -y -q --no-install-recommends $packages > /dev/null; } \
    || give_up "apt-get cannot install $packages"
complete || give_up "the packages $packages lack a program"
