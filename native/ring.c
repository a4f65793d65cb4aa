/*
 * The shim between Python and liburing: one call per scheduler tick.
 *
 * Facts that decide its shape:
 *
 * - cffi releases the GIL around every call, and taking it back can cost a thread switch. So the
 *   whole tick (take the staged entries, submit, wait, reap) is one call, and the CQEs come back in
 *   one array.
 * - Python stages SQEs in memory of its own, not in the kernel's ring. The staging area may hold more
 *   entries than the ring: a tick pushes them through in as many rounds as it takes. So a full
 *   submission queue is no case of its own for the callers, and no cancel can be dropped by one.
 * - An entry Python takes back before the tick carries the opcode TU_NEUTRALISED and is skipped: the
 *   kernel never hears of it.
 * - With DEFER_TASKRUN completions appear only when the owner enters with GETEVENTS; TASKRUN in the SQ
 *   flags says that this is needed. Nothing staged, no flag, nobody asks to wait: no system call.
 * - -ETIME alone does not prove that the time-out expired (a signal can end the wait after entries were
 *   taken), and trio gives a meaning to "nothing happened until the time-out". The clock decides.
 * - Many requests can be one job: their results go straight into an array, and Python hears of the job
 *   once, when the last of them has had its last CQE.
 * - A registered eventfd can miss completions that another eventfd caused; see tu_register_eventfd.
 * - After fork the child shares the ring with its parent. The mappings are not inherited (touching them
 *   would be a fault), so every call compares the fork generation first.
 *
 * Indices and barriers are liburing's (floor: 2.3). Nothing here touches Python objects.
 */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <linux/openat2.h>
#include <linux/stat.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <liburing.h>

#ifdef IO_URING_VERSION_MAJOR
#define TU_LIBURING_MAJOR IO_URING_VERSION_MAJOR
#define TU_LIBURING_MINOR IO_URING_VERSION_MINOR
#else /* the version macros came with 2.4 */
#define TU_LIBURING_MAJOR 2
#define TU_LIBURING_MINOR 3
#endif

#define TU_CQES_PER_TICK 1024
#define TU_WORK_PER_ENTER 20 /* the kernel's IO_LOCAL_TW_DEFAULT_MAX, since Linux 6.13 */
#define TU_NEUTRALISED 0xff
#define TU_SLOT INT64_C(0xfffff)           /* user_data: the low 20 bits are a slot's index */
#define TU_JOB_POSITION_SHIFT 20
#define TU_JOB_POSITION (TU_SLOT << TU_JOB_POSITION_SHIFT)
#define TU_JOB (INT64_C(1) << 62)
#define TU_PENDING INT32_MIN               /* no result is that */
#define TU_MAX_RW_COUNT 0x7ffff000         /* what the kernel transfers at most */
#define TU_FLUSH_PATIENCE_NS INT64_C(2000000000)

/* SQEs are filled in Python, with these in mind. */
_Static_assert(sizeof(void *) == 8, "trio_uring needs a 64-bit machine");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "trio_uring needs a little-endian machine");

/* Their widths differ between C libraries. */
typedef socklen_t tu_socklen_t;
typedef __typeof__(((struct msghdr *)0)->msg_iovlen) tu_iovlen_t;
typedef __typeof__(((struct msghdr *)0)->msg_controllen) tu_controllen_t;

/* What waitid(2) fills of siginfo_t; the C library's names of these fields are macros. */
struct tu_siginfo {
    int signo;
    int error;
    int code;
    int pad;
    int pid;
    unsigned uid;
    int status;
    char rest[100];
};
_Static_assert(sizeof(struct tu_siginfo) == 128, "siginfo_t has 128 bytes");

struct tu_epoll_event {
    uint32_t events;
    uint64_t data;
}
#ifdef __x86_64__
__attribute__((packed))
#endif
;
_Static_assert(sizeof(struct tu_epoll_event) == sizeof(struct epoll_event), "as epoll has it");

/* Newer than the headers may be. */
struct tu_futex {
    uint64_t val;
    uint64_t uaddr;
    uint32_t flags;
    uint32_t reserved;
};

struct tu_recvmsg_out {
    uint32_t namelen;
    uint32_t controllen;
    uint32_t payloadlen;
    uint32_t flags;
};

struct tu_buffer {
    uint64_t addr;
    uint32_t len;
    uint16_t bid;
    uint16_t resv;
};

struct tu_job {
    int64_t token;
    int32_t *results;
    uint32_t size;
    uint32_t left;
    uint32_t each;
};

struct tu_ring {
    unsigned setup_flags;
    unsigned features;
    unsigned sq_entries;
    unsigned cq_entries;
    int ring_fd;
    unsigned reaped;
    uint64_t taken;
    uint64_t enters;
    uint64_t submits;
    uint64_t sqes;
    uint64_t cqes_seen;
    uint64_t cqes_in_jobs;
    uint64_t overflows;
    uint64_t stalls;
    int64_t *cqes;

    struct io_uring ring;
    bool open;
    bool eventfd_registered;
    unsigned workers[2]; /* the limits before ours: they belong to the thread and outlive the ring */
    unsigned fork_generation;
    struct tu_job **jobs; /* by slot */
    unsigned job_slots;
    unsigned jobs_open;
    int64_t reaped_cqes[3 * TU_CQES_PER_TICK];
};

static unsigned fork_generation;
static pthread_once_t fork_handler_once = PTHREAD_ONCE_INIT;

static void forked(void)
{
    fork_generation++;
}

static void install_fork_handler(void)
{
    pthread_atfork(NULL, NULL, forked);
}

static bool belongs_to_parent(const struct tu_ring *r)
{
    return r->fork_generation != fork_generation;
}

static int64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * INT64_C(1000000000) + ts.tv_nsec;
}

struct tu_ring *tu_new(void)
{
    struct tu_ring *r = calloc(1, sizeof(*r));

    if (r) {
        pthread_once(&fork_handler_once, install_fork_handler);
        r->ring_fd = -1;
        r->cqes = r->reaped_cqes;
        r->fork_generation = fork_generation;
    }
    return r;
}

/* One attempt with exactly these flags; which to try next is Python's decision. */
int tu_open(struct tu_ring *r, unsigned entries, unsigned cq_entries, unsigned flags)
{
    struct io_uring_params p = {.flags = flags, .cq_entries = cq_entries};
    int ret = io_uring_queue_init_params(entries, &r->ring, &p);

    if (ret < 0)
        return ret;
    if (!(p.features & IORING_FEAT_EXT_ARG)) {
        io_uring_queue_exit(&r->ring);
        return -ENOSYS;
    }
    ret = io_uring_ring_dontfork(&r->ring);
    if (ret < 0) {
        io_uring_queue_exit(&r->ring);
        return ret;
    }
    r->open = true;
    r->ring_fd = r->ring.ring_fd;
    r->setup_flags = p.flags;
    r->features = p.features;
    r->sq_entries = p.sq_entries;
    r->cq_entries = p.cq_entries;
    return 0;
}

/* Makes the calling thread the ring's owner. Zero leaves a worker limit as it is. */
int tu_enable(struct tu_ring *r, unsigned bounded_workers, unsigned unbounded_workers)
{
    int ret;

    if (belongs_to_parent(r))
        return -EOWNERDEAD;
    if (r->setup_flags & IORING_SETUP_R_DISABLED) {
        /* liburing 2.3 declares io_uring_enable_rings without exporting it. */
        ret = io_uring_register(r->ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
        if (ret < 0)
            return ret;
    }
    r->workers[0] = bounded_workers;
    r->workers[1] = unbounded_workers;
    ret = io_uring_register_iowq_max_workers(&r->ring, r->workers);
    if (ret == -EINVAL) { /* before 5.15 there is no such limit */
        r->workers[0] = r->workers[1] = 0;
        return 0;
    }
    return ret;
}

int tu_probe(struct tu_ring *r, uint8_t *supported, unsigned n)
{
    struct io_uring_probe *probe;
    size_t size = sizeof(*probe) + 256 * sizeof(probe->ops[0]);
    int ret;

    if (belongs_to_parent(r))
        return -EOWNERDEAD;
    probe = calloc(1, size);
    if (!probe)
        return -ENOMEM;
    ret = io_uring_register_probe(&r->ring, probe, 256);
    if (ret >= 0)
        for (unsigned op = 0; op < n; op++)
            supported[op] = op < probe->ops_len && (probe->ops[op].flags & IO_URING_OP_SUPPORTED);
    free(probe);
    return ret < 0 ? ret : 0;
}

/*
 * Has completions signal fd. A completion that is itself caused by a write to an eventfd is signalled
 * late, and only once per registration (seen on 6.18: the kernel never clears its "signal is under way"
 * mark). So whoever is about to sleep on fd registers it anew. With -1 nothing is signalled any more.
 */
int tu_register_eventfd(struct tu_ring *r, int fd)
{
    int ret;

    if (belongs_to_parent(r))
        return -EOWNERDEAD;
    if (r->eventfd_registered) {
        ret = io_uring_unregister_eventfd(&r->ring);
        if (ret < 0)
            return ret;
        r->eventfd_registered = false;
    }
    if (fd < 0)
        return 0;
    ret = io_uring_register_eventfd(&r->ring, fd);
    r->eventfd_registered = ret == 0;
    return ret;
}

/*
 * Registered files (direct descriptors) and buffers: tables of n empty places. Both keep what is put
 * into them alive until the ring is gone or the place is emptied.
 */
int tu_register_files(struct tu_ring *r, unsigned n)
{
    return belongs_to_parent(r) ? -EOWNERDEAD : io_uring_register_files_sparse(&r->ring, n);
}

/* Empties places of the table of files; what was in them is closed. */
int tu_clear_files(struct tu_ring *r, const int *places, unsigned n)
{
    static const int nothing[64] = {[0 ... 63] = -1};

    if (belongs_to_parent(r))
        return -EOWNERDEAD;
    for (unsigned done = 0; done < n;) {
        unsigned run = 1; /* places in a row take one system call */
        int ret;

        while (done + run < n && run < 64 && places[done + run] == places[done] + (int)run)
            run++;
        ret = io_uring_register_files_update(&r->ring, (unsigned)places[done], nothing, run);
        if (ret < 0)
            return ret;
        done += run;
    }
    return 0;
}

int tu_put_file(struct tu_ring *r, unsigned place, int fd)
{
    int ret = belongs_to_parent(r) ? -EOWNERDEAD : io_uring_register_files_update(&r->ring, place, &fd, 1);

    return ret < 0 ? ret : 0;
}

int tu_register_buffers(struct tu_ring *r, unsigned n)
{
    return belongs_to_parent(r) ? -EOWNERDEAD : io_uring_register_buffers_sparse(&r->ring, n);
}

/* A size of 0 empties the place. */
int tu_update_buffer(struct tu_ring *r, unsigned index, void *address, size_t size)
{
    struct iovec vector = {address, size};
    __u64 tag = 0;
    int ret;

    if (belongs_to_parent(r))
        return -EOWNERDEAD;
    ret = io_uring_register_buffers_update_tag(&r->ring, index, &vector, &tag, 1);
    return ret < 0 ? ret : 0;
}

/* Provided buffers: the kernel takes one for a receive when data is there. n is a power of two. */
int tu_register_buffer_ring(struct tu_ring *r, struct tu_buffer *buffers, unsigned n, unsigned group, unsigned flags)
{
    struct { /* older headers do not know the flags */
        uint64_t ring_addr;
        uint32_t ring_entries;
        uint16_t bgid;
        uint16_t flags;
        uint64_t resv[3];
    } reg = {(uintptr_t)buffers, n, (uint16_t)group, (uint16_t)flags, {0}};

    _Static_assert(sizeof(reg) == sizeof(struct io_uring_buf_reg), "as the kernel has it");
    if (belongs_to_parent(r))
        return -EOWNERDEAD;
    return io_uring_register(r->ring_fd, IORING_REGISTER_PBUF_RING, &reg, 1);
}

int tu_unregister_buffer_ring(struct tu_ring *r, unsigned group)
{
    return belongs_to_parent(r) ? -EOWNERDEAD : io_uring_unregister_buf_ring(&r->ring, (int)group);
}

/* Publishes n more entries, which Python has filled behind the tail. */
void tu_provide(struct tu_buffer *buffers, unsigned n)
{
    io_uring_smp_store_release(&buffers->resv, (uint16_t)(buffers->resv + n));
}

/* From now on the CQEs of the requests of `job` are counted off in it; NULL ends that. */
int tu_set_job(struct tu_ring *r, unsigned slot, struct tu_job *job)
{
    if (slot >= r->job_slots) {
        unsigned slots = r->job_slots ? r->job_slots : 64;
        struct tu_job **jobs;

        while (slots <= slot)
            slots *= 2;
        jobs = realloc(r->jobs, slots * sizeof(*jobs));
        if (!jobs)
            return -ENOMEM;
        memset(jobs + r->job_slots, 0, (slots - r->job_slots) * sizeof(*jobs));
        r->jobs = jobs;
        r->job_slots = slots;
    }
    for (uint32_t i = 0; job && i < job->size; i++)
        job->results[i] = TU_PENDING;
    r->jobs_open += !r->jobs[slot];
    r->jobs_open -= !job;
    r->jobs[slot] = job;
    return 0;
}

/* Copies a job's entries to where the next tick takes them from, and gives each its user_data. */
void tu_stage_job(void *staging, const void *entries, unsigned n, int64_t token)
{
    struct io_uring_sqe *sqe = staging;

    memcpy(sqe, entries, n * sizeof(*sqe));
    for (int64_t position = 0; position < n; position++)
        sqe[position].user_data = (uint64_t)(token | position << TU_JOB_POSITION_SHIFT);
}

static unsigned kernel_flags(struct tu_ring *r)
{
    return IO_URING_READ_ONCE(*r->ring.sq.kflags) & (IORING_SQ_CQ_OVERFLOW | IORING_SQ_TASKRUN);
}

/* Is there anything to reap? Reads memory only: safe from a thread that does not own the ring. */
int tu_pending(struct tu_ring *r)
{
    if (belongs_to_parent(r))
        return -EOWNERDEAD;
    return io_uring_cq_ready(&r->ring) || kernel_flags(r);
}

/* The kernel's thread makes room in microseconds, the kernel finds memory in milliseconds. */
static void pause_for_room(const struct tu_ring *r)
{
    usleep(r->setup_flags & IORING_SETUP_SQPOLL ? 10 : 1000);
}

static int submit(struct tu_ring *r)
{
    r->enters++;
    return io_uring_submit(&r->ring);
}

/* How many entries are linked to each other from here on. They are staged as a whole, or taken back as a whole. */
static unsigned chain_length(const struct io_uring_sqe *entry)
{
    unsigned n = 1;

    while ((entry++)->flags & (IOSQE_IO_LINK | IOSQE_IO_HARDLINK))
        n++;
    return n;
}

/*
 * Moves staged entries into the submission queue; a full queue is handed to the kernel on the way. What has been moved
 * is counted in r->taken and must not be staged again, whatever happens next: the kernel finds it at the next enter.
 * A chain goes into one submission: where that ends, the kernel ends the chain.
 */
static int push(struct tu_ring *r, const struct io_uring_sqe *staged, unsigned n)
{
    unsigned room = 0; /* for the rest of the chain */

    for (const struct io_uring_sqe *entry = staged; entry < staged + n; entry++) {
        struct io_uring_sqe *sqe;

        if (entry->opcode == TU_NEUTRALISED) {
            r->taken++;
            continue;
        }
        if (!room) {
            room = chain_length(entry);
            if (io_uring_sq_space_left(&r->ring) < room) {
                int ret = submit(r);

                if (ret < 0)
                    return ret;
                if (io_uring_sq_space_left(&r->ring) < room)
                    return -EAGAIN;
            }
        }
        room--;
        sqe = io_uring_get_sqe(&r->ring);
        memcpy(sqe, entry, sizeof(*sqe));
        r->taken++;
        r->sqes++;
    }
    return 0;
}

static struct tu_job *job_of(const struct tu_ring *r, int64_t user_data)
{
    uint64_t slot = (uint64_t)(user_data & TU_SLOT);
    struct tu_job *job = user_data & TU_JOB && slot < r->job_slots ? r->jobs[slot] : NULL;

    if (job && (user_data & ~TU_JOB_POSITION) == job->token &&
        (user_data & TU_JOB_POSITION) >> TU_JOB_POSITION_SHIFT < job->size && job->left)
        return job;
    return NULL; /* none of ours: Python will say so */
}

/* What of a job's CQE is for Python to see: nothing, as a rule. */
static bool count_off(struct tu_job *job, const struct io_uring_cqe *cqe, int64_t *out)
{
    int64_t user_data = (int64_t)cqe->user_data;
    bool last = !(cqe->flags & IORING_CQE_F_MORE);

    if (!(cqe->flags & IORING_CQE_F_NOTIF))
        job->results[(user_data & TU_JOB_POSITION) >> TU_JOB_POSITION_SHIFT] = cqe->res;
    job->left -= last;
    if (last && job->left == 0) {
        out[0] = job->token;
        out[1] = (int64_t)job->size;
        out[2] = 0;
        return true;
    }
    out[0] = user_data;
    out[1] = cqe->res;
    out[2] = IORING_CQE_F_MORE; /* of the job */
    return last && job->each;
}

static unsigned reap(struct tu_ring *r)
{
    struct io_uring_cqe *cqe;
    unsigned head, n = 0;

    io_uring_for_each_cqe(&r->ring, head, cqe) {
        int64_t *out = r->cqes + 3 * r->reaped;
        struct tu_job *job;

        if (r->reaped == TU_CQES_PER_TICK)
            break;
        n++;
        job = job_of(r, (int64_t)cqe->user_data);
        if (job) {
            if (!count_off(job, cqe, out)) {
                r->cqes_in_jobs++;
                continue;
            }
        } else {
            out[0] = (int64_t)cqe->user_data;
            out[1] = cqe->res;
            out[2] = cqe->flags;
        }
        r->reaped++;
        r->cqes_seen++;
    }
    io_uring_cq_advance(&r->ring, n);
    return n;
}

/*
 * The kernel keeps what did not fit into the CQ and flushes it on an enter with GETEVENTS. The same goes for deferred
 * work behind the first TU_WORK_PER_ENTER pieces, which is done in order: a tick that left a flood of messages there
 * would keep whatever comes behind them waiting, and run the scheduler once for each handful.
 */
static int reap_all(struct tu_ring *r)
{
    unsigned n = reap(r), flags;

    while ((flags = kernel_flags(r)) && r->reaped < TU_CQES_PER_TICK) {
        int ret;

        if (flags & IORING_SQ_CQ_OVERFLOW)
            r->overflows++;
        else if (n < TU_WORK_PER_ENTER)
            break; /* new work: the next tick's enter does it, and submits too */
        r->enters++;
        ret = io_uring_get_events(&r->ring);
        if (ret < 0)
            return ret;
        n = reap(r);
        if (!n)
            break;
    }
    return 0;
}

/* The kernel may refuse entries for a while: completions to be reaped first, or no memory. */
static bool passing_trouble(int err)
{
    return err == -EINTR || err == -EAGAIN || err == -EBUSY || err == -ENOMEM;
}

static int tick(struct tu_ring *r, const struct io_uring_sqe *staged, unsigned n, int64_t timeout_ns)
{
    uint64_t end = r->taken + n;
    bool expired = timeout_ns <= 0, stalled;
    int ret = push(r, staged, n);

    if (ret < 0 && !passing_trouble(ret))
        return ret;

    if (ret == 0 && timeout_ns > 0 && !io_uring_cq_ready(&r->ring)) {
        struct __kernel_timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
        struct io_uring_cqe *cqe;
        int64_t start = now_ns();

        r->enters++;
        ret = io_uring_submit_and_wait_timeout(&r->ring, &cqe, 1, &ts, NULL);
        expired = now_ns() - start >= timeout_ns;
        if (ret == -ETIME || ret > 0)
            ret = 0;
    } else if (ret < 0 || io_uring_sq_ready(&r->ring) || kernel_flags(r)) {
        r->enters++;
        ret = io_uring_submit_and_get_events(&r->ring);
        if (ret > 0)
            ret = 0;
    }
    if (ret < 0 && !passing_trouble(ret))
        return ret;

    stalled = r->taken < end || (!(r->setup_flags & IORING_SETUP_SQPOLL) && io_uring_sq_ready(&r->ring));
    ret = reap_all(r);
    if (ret < 0 && !passing_trouble(ret))
        return ret;
    if (stalled) {
        r->stalls++;
        if (!r->reaped)
            pause_for_room(r);
        return -EAGAIN;
    }
    if (r->reaped)
        return (int)r->reaped;
    return expired ? -ETIME : -EINTR;
}

/*
 * Submits the first n staged entries, waits up to timeout_ns for a completion (not at all when there
 * is one already), reaps. Returns the number of CQEs in r->cqes when everything went through, and
 * -ETIME in place of 0 when the time-out expired. Any other negative value: r->taken and r->reaped
 * tell how far it came; -EINTR, the wait ended early without a completion; -EAGAIN, entries are left.
 *
 * Where all that came was counted off in jobs there is no news for Python yet, and the wait goes on.
 */
int tu_tick(struct tu_ring *r, const void *staged, unsigned n, int64_t timeout_ns)
{
    uint64_t in_jobs = r->cqes_in_jobs;
    int64_t deadline = 0;
    int ret;

    if (belongs_to_parent(r))
        return -EOWNERDEAD;
    r->reaped = 0;
    r->submits += n > 0;
    if (r->jobs_open && timeout_ns > 0)
        deadline = now_ns() + timeout_ns;
    ret = tick(r, staged, n, timeout_ns);
    while (ret == -EINTR && r->cqes_in_jobs != in_jobs) {
        in_jobs = r->cqes_in_jobs;
        timeout_ns = deadline - now_ns();
        if (timeout_ns <= 0)
            return -ETIME;
        ret = tick(r, NULL, 0, timeout_ns);
    }
    return ret;
}

/*
 * Hands every entry to the kernel now, and runs the completions that are due (a cancelled poll gives
 * its file back there). CQEs stay in the ring for the next tick. Bounded: -EAGAIN if the kernel keeps
 * refusing.
 */
int tu_flush(struct tu_ring *r, const void *staged, unsigned n)
{
    uint64_t start = r->taken;
    int64_t deadline = now_ns() + TU_FLUSH_PATIENCE_NS;

    if (belongs_to_parent(r))
        return -EOWNERDEAD;
    do {
        unsigned done = (unsigned)(r->taken - start);
        int ret = push(r, (const struct io_uring_sqe *)staged + done, n - done);

        if (ret < 0 && !passing_trouble(ret))
            return ret;
        r->enters++;
        ret = io_uring_submit_and_get_events(&r->ring);
        if (ret < 0 && !passing_trouble(ret))
            return ret;
        if (r->taken == start + n && !io_uring_sq_ready(&r->ring))
            return 0;
        pause_for_room(r);
    } while (now_ns() < deadline);
    return -EAGAIN;
}

/* Closing does not end the kernel's use of memory named in SQEs: drain first. */
void tu_free(struct tu_ring *r)
{
    if (r->open) {
        if (belongs_to_parent(r)) {
            close(r->ring_fd);
        } else {
            if (r->workers[0] || r->workers[1])
                io_uring_register_iowq_max_workers(&r->ring, r->workers);
            io_uring_queue_exit(&r->ring);
        }
    }
    free(r->jobs);
    free(r);
}
