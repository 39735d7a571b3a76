# The first process of the machine. WORK, COMMAND (program and arguments, quoted) and READABLE come before this text.
# The root is the builder's own, read-only; only WORK can be written to, and what is mounted here is gone with the machine.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/run LC_ALL=C.UTF-8

power_off() {
    echo o > /proc/sysrq-trigger
    while :; do sleep 1; done
}

mount -t proc proc /proc
trap power_off EXIT
mount -t sysfs sys /sys
[ -e /dev/null ] || mount -t devtmpfs dev /dev
mount -t cgroup2 cgroup /sys/fs/cgroup || echo "init: no control groups"
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp

# These may lie where a tmpfs was just mounted.
show() {
    [ -d "$1" ] || mkdir -p "$1"
    mount "$2" -t hostfs -o "$1" none "$1"
}
for directory in $READABLE; do show "$directory" --read-only; done
show "$WORK" --rw

# As on a machine of its own, whoever needs a module gets it, here from the kernel's package.
mkdir -p "$WORK/modules/lib"
ln -s /usr/lib/uml/modules "$WORK/modules/lib/modules"
printf '#!/bin/sh\nexec /sbin/modprobe -d %s "$@"\n' "'$WORK/modules'" > "$WORK/modprobe"
chmod +x "$WORK/modprobe"
echo "$WORK/modprobe" > /proc/sys/kernel/modprobe
"$WORK/modprobe" ipv6

ip link set lo up
code=0
eval "$COMMAND" || code=$?
# Whole or not at all: whoever booted the machine may look at any moment.
echo "$code" > "$WORK/code.part"
mv "$WORK/code.part" "$WORK/code"
