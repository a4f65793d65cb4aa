/* What Python sees of ring.c and fill.c. Read by cffi: declarations only, no preprocessor. */

struct tu_ring {
    unsigned setup_flags;      /* IORING_SETUP_* the kernel accepted            */
    unsigned features;         /* IORING_FEAT_*                                 */
    unsigned sq_entries;
    unsigned cq_entries;
    int ring_fd;
    unsigned reaped;           /* of the last tick: CQEs in `cqes`              */
    uint64_t taken;            /* entries taken from staging, ever              */
    uint64_t enters;           /* io_uring_enter calls, ever                    */
    uint64_t submits;          /* ticks that had something to submit            */
    uint64_t sqes;             /* entries handed to the kernel, ever            */
    uint64_t cqes_seen;        /* CQEs handed to Python, ever                   */
    uint64_t cqes_in_jobs;     /* CQEs counted off in a job instead, ever       */
    uint64_t overflows;        /* times the kernel flagged CQ overflow          */
    uint64_t stalls;           /* times the kernel took no entry for lack of memory */
    int64_t *cqes;             /* triples: user_data, res, flags                */
    ...;
};

/* Many requests that Python waits for as one. Python owns the memory; the ring only looks at it. */
struct tu_job {
    int64_t token;             /* the user_data of its requests, but for the position */
    int32_t *results;          /* one for each request                          */
    uint32_t size;             /* how many                                      */
    uint32_t left;             /* of these, how many have not had their last CQE */
    uint32_t each;             /* report each request's last CQE                */
};

/* An entry of a ring of provided buffers. The first one's `resv` is the ring's tail. */
struct tu_buffer { uint64_t addr; uint32_t len; uint16_t bid; uint16_t resv; };

#define TU_CQES_PER_TICK ...
#define TU_NEUTRALISED ...
#define TU_SLOT ...
#define TU_JOB ...
#define TU_JOB_POSITION ...
#define TU_PENDING ...
#define TU_MAX_RW_COUNT ...
#define TU_LIBURING_MAJOR ...
#define TU_LIBURING_MINOR ...

struct tu_ring *tu_new(void);
int tu_open(struct tu_ring *r, unsigned entries, unsigned cq_entries, unsigned flags);
int tu_enable(struct tu_ring *r, unsigned bounded_workers, unsigned unbounded_workers);
int tu_probe(struct tu_ring *r, uint8_t *supported, unsigned n);
int tu_tick(struct tu_ring *r, const void *staged, unsigned n, int64_t timeout_ns);
int tu_flush(struct tu_ring *r, const void *staged, unsigned n);
int tu_pending(struct tu_ring *r);
int tu_register_eventfd(struct tu_ring *r, int fd);
int tu_set_job(struct tu_ring *r, unsigned slot, struct tu_job *job);
void tu_stage_job(void *staging, const void *entries, unsigned n, int64_t token);
int tu_register_files(struct tu_ring *r, unsigned n);
int tu_clear_files(struct tu_ring *r, const int *places, unsigned n);
int tu_put_file(struct tu_ring *r, unsigned place, int fd);
int tu_register_buffers(struct tu_ring *r, unsigned n);
int tu_update_buffer(struct tu_ring *r, unsigned index, void *address, size_t size);
int tu_register_buffer_ring(struct tu_ring *r, struct tu_buffer *buffers, unsigned n, unsigned group, unsigned flags);
int tu_unregister_buffer_ring(struct tu_ring *r, unsigned group);
void tu_provide(struct tu_buffer *buffers, unsigned n);
void tu_free(struct tu_ring *r);

/* And of fill.c. `rows` and `file` are addresses of Python objects. */

struct tu_pins { unsigned n; ...; };

struct tu_pins *tu_new_pins(unsigned n);
void tu_free_pins(struct tu_pins *pins);
int tu_fill(void *sqes, const void *blank, const char *form, const void *rows, const void *file, struct tu_pins *pins);
void tu_weave(void *woven, const void *sqes, unsigned n, unsigned steps, unsigned step, unsigned link,
              const int32_t *opened, const int32_t *used);

/* And of slot.c. `dict` is the address of a Python object. */

int tu_add_types(const void *dict);

/* The structs operations own while the kernel uses them. */

typedef int... tu_socklen_t;
typedef int... tu_iovlen_t;
typedef int... tu_controllen_t;

struct iovec { void *iov_base; size_t iov_len; };

struct msghdr {
    void *msg_name;
    tu_socklen_t msg_namelen;
    struct iovec *msg_iov;
    tu_iovlen_t msg_iovlen;
    void *msg_control;
    tu_controllen_t msg_controllen;
    int msg_flags;
    ...;
};

struct sockaddr_storage { ...; };

struct open_how { uint64_t flags; uint64_t mode; uint64_t resolve; };

struct tu_siginfo { int signo; int error; int code; int pid; unsigned uid; int status; ...; };

struct tu_epoll_event { uint32_t events; uint64_t data; ...; };

struct tu_futex { uint64_t val; uint64_t uaddr; uint32_t flags; uint32_t reserved; };

struct tu_recvmsg_out { uint32_t namelen; uint32_t controllen; uint32_t payloadlen; uint32_t flags; };

struct __kernel_timespec { int64_t tv_sec; int64_t tv_nsec; };

struct statx_timestamp { int64_t tv_sec; uint32_t tv_nsec; ...; };

struct statx {
    uint32_t stx_mask;
    uint32_t stx_blksize;
    uint64_t stx_attributes;
    uint32_t stx_nlink;
    uint32_t stx_uid;
    uint32_t stx_gid;
    uint16_t stx_mode;
    uint64_t stx_ino;
    uint64_t stx_size;
    uint64_t stx_blocks;
    uint64_t stx_attributes_mask;
    struct statx_timestamp stx_atime;
    struct statx_timestamp stx_btime;
    struct statx_timestamp stx_ctime;
    struct statx_timestamp stx_mtime;
    uint32_t stx_rdev_major;
    uint32_t stx_rdev_minor;
    uint32_t stx_dev_major;
    uint32_t stx_dev_minor;
    ...;
};
