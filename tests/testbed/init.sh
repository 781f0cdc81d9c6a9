#!/bin/busybox sh
# The guest's first process: mounts, modules, then a loop that runs commands for the test.
#
# On the second serial port a request is one line, "ID SECONDS BASE64", the last word a shell
# script.  The reply is one line, "ID CODE LENGTH", and LENGTH bytes of output.  Requests run side
# by side; a reply is written whole.  "hello" says that the guest is up, after each boot.

/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox --install -s /bin
touch /run/profile
export PATH=/programs:/bin HOME=/
# busybox prefers its own applets to what the path has; a function comes before both
for program in /programs/*; do
    [ -e "$program" ] && echo "${program##*/}() { $program \"\$@\"; }" >>/run/profile
done
for module in /modules/*.ko; do
    [ -e "$module" ] && insmod "$module"
done
ip link set lo up

serve() {
    script=/tmp/$1.script
    output=/tmp/$1.output
    {
        cat /run/profile
        echo "$3" | base64 -d
    } >"$script"
    timeout -s KILL "$2" sh "$script" >"$output" 2>&1 </dev/null
    echo "$1 $?" >&4
}

reply() {
    while read -r id code; do
        echo "$id $code $(wc -c <"/tmp/$id.output")"
        cat "/tmp/$id.output"
        rm "/tmp/$id.script" "/tmp/$id.output"
    done
}

# A shell whose `read` is interrupted by the end of a child starts again without what it had read.
# So lines are read by a shell without children, and passed on by a FIFO, where a line is whole.
relay() {
    while read -r line; do
        echo "$line"
    done
}

exec 3<>/dev/ttyS1
stty raw -echo <&3
mkfifo /run/requests /run/replies
exec 4<>/run/replies 5<>/run/requests
relay <&3 >&5 &
reply <&4 >&3 &
echo hello >&3
while read -r id seconds script <&5; do
    serve "$id" "$seconds" "$script" &
done
poweroff -f
