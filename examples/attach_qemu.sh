#!/bin/sh
# Attach your own QEMU: serves one virtio-net device and says how to start QEMU on it.
#
#     examples/attach_qemu.sh [UPLINK [SOCKET]]
#
# UPLINK is what the device is wired to:
#     none        nothing (the default)
#     passt       the host's network without any privilege; passt must be installed
#     tap:NAME    a TAP device of yours, such as one made by
#                 ip tuntap add NAME mode tap user $USER vnet_hdr && ip link set NAME up
# SOCKET is where QEMU connects; ./vm.sock if left out.  End with Ctrl-C, after QEMU.

set -eu
uplink=${1:-none}
socket=${2:-$PWD/vm.sock}
server=$(dirname "$0")/../.venv/bin/vfio-user-virtio
[ -x "$server" ] || server=vfio-user-virtio

cat <<END
Add this to your QEMU (vfio-user-pci is there since 10.1; 11.1.3 is what is tested), on x86:

    -machine q35,memory-backend=ram -m 1G \\
    -object memory-backend-memfd,id=ram,size=1G,share=on \\
    -device pcie-root-port,id=port1,slot=1 \\
    -device '{"driver":"vfio-user-pci","bus":"port1","x-msg-timeout":60000,"socket":{"type":"unix","path":"$socket"}}'

share=on           Without it guest and device see different memory, and neither can tell.
x-msg-timeout      Milliseconds that QEMU waits for a reply.  After that the device is lost for
                   good; the default of 5000 is little for a host that is busy or suspended.
Ending the server  Not before QEMU: without it QEMU aborts when it next re-maps memory, for
                   example when the guest reboots.
Hot-unplug         Aborts QEMU 11.1.3 (device_del of a vfio-user device with MSI-X).
Migration          Not yet.  QEMU 11.1.3 does not refuse it: it loses the device's state silently.

END
exec "$server" serve --socket-path "$socket" --uplink "$uplink"
