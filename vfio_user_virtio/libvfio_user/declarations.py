"""libvfio-user's public functions and types as cffi reads them, and the constants of its header.

Written from the header ``libvfio-user.h`` as it is in the middle of 2026; what differs in libraries
that are in use (`vfu_setup_device_dma` had no `max_regions` before March 2026) has a declaration of
each kind.  Pointers to the caller's functions are declared as ``void *``: they are made elsewhere
(`vfio_user_virtio.libvfio_user.callbacks` says why), and there they have their types.

Left out: `vfu_get_private` (Python objects have no need of it), and the structures of PCI
capabilities, which `vfio_user_virtio.pci` has as bytes.
"""

from __future__ import annotations

import enum
from typing import Final

DECLARATIONS: Final = """
typedef struct vfu_ctx vfu_ctx_t;
typedef struct dma_sg dma_sg_t;
struct iovec { void *iov_base; size_t iov_len; };
typedef struct {
    struct iovec iova;
    void *vaddr;
    struct iovec mapping;
    size_t page_size;
    uint32_t prot;
} vfu_dma_info_t;
typedef struct {
    int version;
    void *transition;
    void *read_data;
    void *write_data;
} vfu_migration_callbacks_t;

vfu_ctx_t *vfu_create_ctx(int trans, const char *path, int flags, void *pvt, int dev_type);
int vfu_realize_ctx(vfu_ctx_t *);
int vfu_attach_ctx(vfu_ctx_t *);
int vfu_get_poll_fd(vfu_ctx_t *);
int vfu_run_ctx(vfu_ctx_t *);
void vfu_destroy_ctx(vfu_ctx_t *);
void vfu_log(vfu_ctx_t *, int level, const char *fmt, ...);
int vfu_setup_log(vfu_ctx_t *, void *log, int level);

int vfu_setup_region(vfu_ctx_t *, int region_idx, size_t size, void *region_access, int flags,
                     struct iovec *mmap_areas, uint32_t nr_mmap_areas, int fd, uint64_t offset);
int vfu_setup_device_reset_cb(vfu_ctx_t *, void *reset);
void vfu_setup_device_quiesce_cb(vfu_ctx_t *, void *quiesce);
int vfu_device_quiesced(vfu_ctx_t *, int quiesce_errno);
int vfu_setup_device_nr_irqs(vfu_ctx_t *, int type, uint32_t count);
int vfu_setup_irq_state_callback(vfu_ctx_t *, int type, void *cb);
int vfu_setup_device_migration_callbacks(vfu_ctx_t *, const vfu_migration_callbacks_t *);
int vfu_irq_trigger(vfu_ctx_t *, uint32_t subindex);
int vfu_create_ioeventfd(vfu_ctx_t *, uint32_t region_idx, int fd, size_t gpa_offset, uint32_t size,
                         uint32_t flags, uint64_t datamatch, int shadow_fd, size_t shadow_offset);

size_t dma_sg_size(void);
int vfu_addr_to_sgl(vfu_ctx_t *, void *dma_addr, size_t len, dma_sg_t *, size_t max_nr_sgs,
                    int prot);
int vfu_sgl_get(vfu_ctx_t *, dma_sg_t *, struct iovec *, size_t cnt, int flags);
void vfu_sgl_put(vfu_ctx_t *, dma_sg_t *, struct iovec *, size_t cnt);
void vfu_sgl_mark_dirty(vfu_ctx_t *, dma_sg_t *, size_t cnt);
int vfu_sgl_read(vfu_ctx_t *, dma_sg_t *, size_t cnt, void *data, int flags);
int vfu_sgl_write(vfu_ctx_t *, dma_sg_t *, size_t cnt, void *data, int flags);
_Bool vfu_sg_is_mappable(vfu_ctx_t *, dma_sg_t *);

int vfu_pci_init(vfu_ctx_t *, int pci_type, int hdr_type, int revision);
void vfu_pci_set_id(vfu_ctx_t *, uint16_t vid, uint16_t did, uint16_t ssvid, uint16_t ssid);
void vfu_pci_set_class(vfu_ctx_t *, uint8_t base, uint8_t sub, uint8_t pi);
void *vfu_pci_get_config_space(vfu_ctx_t *);
ssize_t vfu_pci_add_capability(vfu_ctx_t *, size_t pos, int flags, void *data);
size_t vfu_pci_find_capability(vfu_ctx_t *, _Bool extended, int cap_id);
size_t vfu_pci_find_next_capability(vfu_ctx_t *, _Bool extended, size_t pos, int cap_id);
"""

LIMITED_DMA: Final = """
int vfu_setup_device_dma(vfu_ctx_t *, size_t max_regions, void *dma_register, void *dma_unregister);
"""
"""Since March 2026."""

UNLIMITED_DMA: Final = """
int vfu_setup_device_dma(vfu_ctx_t *, void *dma_register, void *dma_unregister);
"""
"""Before."""

FUNCTIONS: Final = (
    *(
        line.partition("(")[0].rpartition(" ")[2].lstrip("*")
        for line in DECLARATIONS.splitlines()
        if "(" in line and not line.startswith((" ", "typedef"))
    ),
    "vfu_setup_device_dma",
)
"""The functions that a library must have."""

MAX_DMA_REGIONS: Final = 1_000_000
"""LIBVFIO_USER_MAX_DMA_REGIONS."""

MIGRATION_VERSION: Final = 2
"""VFU_MIGR_CALLBACKS_VERS: migration as the kernel has it since Linux 5.18."""


class PciType(enum.IntEnum):
    """vfu_pci_type_t; PCI_X_2 and EXPRESS have 4 KiB of configuration space, the others 256 B."""

    CONVENTIONAL = 0
    PCI_X_1 = 1
    PCI_X_2 = 2
    EXPRESS = 3


class Region(enum.IntEnum):
    """Region indices, VFU_PCI_DEV_…_REGION_IDX."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class RegionFlag(enum.IntFlag):
    """VFU_REGION_FLAG_…; a BAR without MEM is one of I/O ports.

    ALWAYS_CALLBACK, for CONFIG: the library hands every access on instead of keeping the header
    and the capabilities itself.
    """

    READ = 1 << 0
    WRITE = 1 << 1
    READ_WRITE = READ | WRITE
    MEM = 1 << 2
    ALWAYS_CALLBACK = 1 << 3
    BITS_64 = 1 << 4
    PREFETCH = 1 << 5


class Irq(enum.IntEnum):
    """enum vfu_dev_irq_type."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class ResetKind(enum.IntEnum):
    """vfu_reset_type_t: the client asked; it is gone; the guest asked by PCI Express."""

    DEVICE = 0
    LOST_CONNECTION = 1
    FUNCTION_LEVEL = 2


class MigrationState(enum.IntEnum):
    """vfu_migr_state_t: what `Migration.transition` is told, which are not the wire's numbers."""

    STOP = 0
    RUNNING = 1
    STOP_AND_COPY = 2
    PRE_COPY = 3
    RESUME = 4


class Protection(enum.IntFlag):
    """What is done with guest memory: PROT_READ, PROT_WRITE; WRITE marks it dirty."""

    NONE = 0
    READ = 1
    WRITE = 2


class CapabilityFlag(enum.IntFlag):
    """VFU_CAP_FLAG_…: an extended capability; accesses go to the callback; no writes."""

    NONE = 0
    EXTENDED = 1 << 0
    CALLBACK = 1 << 1
    READ_ONLY = 1 << 2


class LogLevel(enum.IntEnum):
    """Levels of syslog(3)."""

    EMERGENCY = 0
    ALERT = 1
    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6
    DEBUG = 7


TRANSPORT_SOCKET: Final = 0
DEVICE_PCI: Final = 0
HEADER_NORMAL: Final = 0
NON_BLOCKING: Final = 1 << 0
DIRECT_ACCESS: Final = 1
