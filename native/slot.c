/*
 * The hot part of an operation's life: what happens to each of them, once, and nearly always in the same way.
 *
 * Facts that decide its shape:
 *
 * - A round trip on a socket is two operations, and in Python each costs more for being begun, completed and waited for
 *   than the kernel needs for it. In C that is a fifth.
 * - `_cancel` decides what becomes of an operation. Here are the two transitions that all of them make (it is staged; its
 *   last CQE comes, with a result) and the one that ends them (the task has picked the result up). Whatever is out of the
 *   ordinary is left to the Python way, which does the same and knows better.
 * - The Python classes are made of these types, and their names for the fields are the same. A field that C does not
 *   look at is an object like any other.
 * - What waits for an operation is an object of its own, for one life: the slot may serve another task before this one
 *   has heard that it was let go.
 * - Giving up an object can run any code. So everything is in order before that happens.
 *
 * These are Python types, in the stable ABI. cffi does not know such things: tu_add_types puts them into a dict.
 */
#include <structmember.h>

#define TU_SLOT_BITS 20
#define TU_GENERATION (INT64_C(1) << TU_SLOT_BITS)
#define TU_ADDR3_AT 48 /* liburing 2.3 has no name for it everywhere */

/* The staging area of a ring: see SubmissionQueue. */
struct queue {
    PyObject_HEAD
    long long base;
    long long tail;
    long long capacity;
    unsigned long long address; /* of the memory */
    PyObject *_sqes;            /* which hold it */
    PyObject *_memory;          /* the same, for cffi, */
    PyObject *_bytes;           /* as bytes, */
    PyObject *_pointers;        /* and as an array of pointers */
    PyObject *noticed;          /* called with the opcode before something is staged */
};

/* The task comes first: without it nobody gives the operation up while it is taken apart. */
#define SLOT_FIELDS(F) \
    F(task) F(owner) F(home) F(waiters) F(trap) F(stand_in) F(_state) F(kind) F(fd) F(pin) F(keep) F(siblings) F(since) \
    F(res) F(flags) F(interrupt)

struct slot {
    PyObject_HEAD
    long long token;
    long long number; /* of its SQE */
    char ordinary;    /* is its kind? */
#define FIELD(name) PyObject *name;
    SLOT_FIELDS(FIELD)
#undef FIELD
};

/* Provided buffers: see BufferRing. */
struct buffers {
    PyObject_HEAD
    unsigned long long memory;  /* the addresses of the buffers */
    unsigned long long entries; /* and of the entries that tell the kernel of them */
    long long count;
    long long size;
    long long tail; /* where the next entry goes */
    long long out;
};

struct wait {
    PyObject_HEAD
    struct slot *slot;
    long long token;
    struct buffers *buffers; /* if the result is what is received into one of them */
};

static PyTypeObject *queue_type, *buffers_type, *slot_type, *wait_type, *operation_type;
static PyObject *idle, *in_flight, *settled; /* states, see `_cancel` */
static PyObject *name_head, *name_ordinary, *name_keeps, *name_complete, *name_abandon, *name_unwrap, *name_let_go,
    *name_pick_up_late, *name_grow, *name_not_received;

static void put(PyObject **field, PyObject *value)
{
    PyObject *old = *field;

    Py_XINCREF(value);
    *field = value;
    Py_XDECREF(old);
}

static PyObject *given(PyObject *value)
{
    PyObject *object = value ? value : Py_None;

    Py_INCREF(object);
    return object;
}

static bool is_none(PyObject *field)
{
    return field == NULL || field == Py_None;
}

static bool fits(PyObject *argument, int64_t lowest, int64_t highest, int64_t *value)
{
    bool good = integer(argument, lowest, highest, value);

    if (PyErr_Occurred())
        PyErr_Clear();
    return good;
}

/* Queue */

#define QUEUE_FIELDS(F) F(_sqes) F(_memory) F(_bytes) F(_pointers) F(noticed)

static int queue_traverse(PyObject *object, visitproc visit, void *arg)
{
    struct queue *self = (struct queue *)object;

    Py_VISIT(Py_TYPE(object));
#define FIELD(name) Py_VISIT(self->name);
    QUEUE_FIELDS(FIELD)
#undef FIELD
    return 0;
}

static int queue_clear(PyObject *object)
{
    struct queue *self = (struct queue *)object;

#define FIELD(name) Py_CLEAR(self->name);
    QUEUE_FIELDS(FIELD)
#undef FIELD
    return 0;
}

static void queue_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_GC_UnTrack(self);
    queue_clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static struct io_uring_sqe *entries_of(const struct queue *queue)
{
    return (struct io_uring_sqe *)(uintptr_t)queue->address;
}

static bool called(PyObject *done)
{
    Py_XDECREF(done);
    return done != NULL;
}

/* Before something is staged. What this calls may stage, too. */
static bool make_room(struct queue *queue, uint8_t opcode, long long n)
{
    if (!is_none(queue->noticed)) {
        PyObject *noticed = given(queue->noticed), *number = PyLong_FromLong(opcode);
        bool good = number != NULL && called(PyObject_CallFunctionObjArgs(noticed, number, NULL));

        Py_DECREF(noticed);
        Py_XDECREF(number);
        if (!good)
            return false;
    }
    while (queue->tail - queue->base + n > queue->capacity)
        if (!called(PyObject_CallMethodObjArgs((PyObject *)queue, name_grow, NULL)))
            return false;
    return true;
}

/* Any integer. What does not fit is an OverflowError. */
static bool field(PyObject *argument, int64_t lowest, uint64_t highest, uint64_t *value)
{
    PyObject *number = PyNumber_Index(argument);
    int64_t negative;

    if (number == NULL)
        return false;
    *value = PyLong_AsUnsignedLongLong(number);
    if (!PyErr_Occurred()) {
        Py_DECREF(number);
        if (*value <= highest)
            return true;
    } else {
        PyErr_Clear();
        negative = PyLong_AsLongLong(number);
        Py_DECREF(number);
        if (!PyErr_Occurred() && negative < 0 && negative >= lowest) {
            *value = (uint64_t)negative;
            return true;
        }
        PyErr_Clear();
    }
    PyErr_Format(PyExc_OverflowError, "an argument does not fit the submission queue entry: %R", argument);
    return false;
}

/*
 * put(head, fd, off, addr, length, op_flags, user_data, buf_index, personality, file_index, addr3): stages an entry with
 * these fields and returns its number. All arguments are looked at before it is taken: they may run any code.
 */
static PyObject *queue_put(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    struct queue *queue = (struct queue *)self;
    struct io_uring_sqe sqe;
    uint64_t head, fd, off, addr, length, op_flags, user_data, buf_index, personality, file_index, addr3;

    if (n != 11)
        return PyErr_Format(PyExc_TypeError, "put takes 11 arguments, not %zd", n);
    if (!field(args[0], 0, UINT32_MAX, &head) || !field(args[1], INT32_MIN, INT32_MAX, &fd) ||
        !field(args[2], INT64_MIN, INT64_MAX, &off) || !field(args[3], 0, UINT64_MAX, &addr) ||
        !field(args[4], 0, UINT32_MAX, &length) || !field(args[5], 0, UINT32_MAX, &op_flags) ||
        !field(args[6], 0, UINT64_MAX, &user_data) || !field(args[7], 0, UINT16_MAX, &buf_index) ||
        !field(args[8], 0, UINT16_MAX, &personality) || !field(args[9], INT32_MIN, INT32_MAX, &file_index) ||
        !field(args[10], 0, UINT64_MAX, &addr3) || !make_room(queue, (uint8_t)head, 1))
        return NULL;
    memset(&sqe, 0, sizeof(sqe));
    memcpy(&sqe, &(uint32_t){(uint32_t)head}, sizeof(uint32_t)); /* opcode, flags, ioprio */
    sqe.fd = (int32_t)fd;
    sqe.off = off;
    sqe.addr = addr;
    sqe.len = (uint32_t)length;
    sqe.rw_flags = (int)(uint32_t)op_flags;
    sqe.user_data = user_data;
    sqe.buf_index = (uint16_t)buf_index;
    sqe.personality = (uint16_t)personality;
    sqe.file_index = (uint32_t)file_index;
    memcpy((char *)&sqe + TU_ADDR3_AT, &addr3, sizeof(addr3));
    memcpy(entries_of(queue) + (queue->tail - queue->base), &sqe, sizeof(sqe));
    return PyLong_FromLongLong(queue->tail++);
}

/* put_job(address, n, token): stages n filled entries with user_data `token | position << 20`; the first one's number. */
static PyObject *queue_put_job(PyObject *self, PyObject *args)
{
    struct queue *queue = (struct queue *)self;
    unsigned long long address;
    long long token, number;
    unsigned n;

    if (!PyArg_ParseTuple(args, "KIL", &address, &n, &token) || !make_room(queue, IORING_OP_NOP, n))
        return NULL;
    tu_stage_job(entries_of(queue) + (queue->tail - queue->base), (const void *)(uintptr_t)address, n, token);
    number = queue->tail;
    queue->tail += n;
    return PyLong_FromLongLong(number);
}

/* _move_to(capacity, address, sqes, memory, bytes, pointers): more room, unless there is as much by now. */
static PyObject *queue_move_to(PyObject *object, PyObject *args)
{
    struct queue *self = (struct queue *)object;
    unsigned long long address;
    PyObject *sqes, *memory, *bytes, *pointers;
    long long capacity;

    if (!PyArg_ParseTuple(args, "LKOOOO", &capacity, &address, &sqes, &memory, &bytes, &pointers))
        return NULL;
    if (capacity <= self->capacity)
        return given(NULL);
    if (self->tail > self->base)
        memcpy((void *)(uintptr_t)address, entries_of(self), (size_t)(self->tail - self->base) * sizeof(struct io_uring_sqe));
    self->capacity = capacity;
    self->address = address;
    put(&self->_sqes, sqes);
    put(&self->_memory, memory);
    put(&self->_bytes, bytes);
    put(&self->_pointers, pointers);
    return given(NULL);
}

/* _consumed(n): the first n staged entries are with the kernel. None, if somebody has said so before. */
static PyObject *queue_consumed(PyObject *object, PyObject *args)
{
    struct queue *self = (struct queue *)object;
    long long n;

    if (!PyArg_ParseTuple(args, "L", &n))
        return NULL;
    if (n <= 0)
        return given(NULL);
    self->base += n;
    if (self->tail > self->base)
        memmove(entries_of(self), entries_of(self) + n, (size_t)(self->tail - self->base) * sizeof(struct io_uring_sqe));
    return given(NULL);
}

static PyMethodDef queue_methods[] = {
    {"_move_to", queue_move_to, METH_VARARGS, NULL},
    {"_consumed", queue_consumed, METH_VARARGS, NULL},
    {"put", (PyCFunction)(void *)queue_put, METH_FASTCALL, NULL},
    {"put_job", queue_put_job, METH_VARARGS, NULL},
    {NULL},
};

static PyMemberDef queue_members[] = {
    {"base", T_LONGLONG, offsetof(struct queue, base), 0, NULL},
    {"tail", T_LONGLONG, offsetof(struct queue, tail), 0, NULL},
    {"capacity", T_LONGLONG, offsetof(struct queue, capacity), 0, NULL},
#define FIELD(name) {#name, T_OBJECT, offsetof(struct queue, name), 0, NULL},
    QUEUE_FIELDS(FIELD)
#undef FIELD
    {NULL},
};

static PyType_Slot queue_slots[] = {
    {Py_tp_dealloc, queue_dealloc},
    {Py_tp_traverse, queue_traverse},
    {Py_tp_clear, queue_clear},
    {Py_tp_members, queue_members},
    {Py_tp_methods, queue_methods},
    {0, NULL},
};

static PyType_Spec queue_spec = {
    .name = "trio_uring._native.Queue",
    .basicsize = sizeof(struct queue),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = queue_slots,
};

/* Buffers */

static void buffers_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* What a CQE with these flags has received. The buffer goes back at once. */
static PyObject *copied(struct buffers *self, int64_t flags, int64_t length)
{
    struct tu_buffer *entries = (struct tu_buffer *)(uintptr_t)self->entries;
    struct tu_buffer *entry = &entries[self->tail & (self->count - 1)];
    int64_t number = flags >> IORING_CQE_BUFFER_SHIFT;
    uint64_t address = self->memory + (uint64_t)(number * self->size);
    PyObject *data;

    if (!(flags & IORING_CQE_F_BUFFER) || number < 0 || number >= self->count || length < 0 || length > self->size) {
        PyErr_Format(PyExc_ValueError, "no such buffer: flags %lld, length %lld", (long long)flags, (long long)length);
        return NULL;
    }
    data = PyBytes_FromStringAndSize((const char *)(uintptr_t)address, (Py_ssize_t)length);
    if (data == NULL) /* whoever gives the operation up gives it back */
        return NULL;
    entry->addr = address;
    entry->len = (uint32_t)self->size;
    entry->bid = (uint16_t)number; /* not the last field: in the first entry it is the ring's tail */
    self->tail++;
    tu_provide(entries, 1);
    return data;
}

static PyObject *buffers_copy(PyObject *self, PyObject *args)
{
    long long flags, length;

    return PyArg_ParseTuple(args, "LL", &flags, &length) ? copied((struct buffers *)self, flags, length) : NULL;
}

static PyMemberDef buffers_members[] = {
    {"memory", T_ULONGLONG, offsetof(struct buffers, memory), 0, NULL},
    {"entries", T_ULONGLONG, offsetof(struct buffers, entries), 0, NULL},
    {"count", T_LONGLONG, offsetof(struct buffers, count), 0, NULL},
    {"size", T_LONGLONG, offsetof(struct buffers, size), 0, NULL},
    {"tail", T_LONGLONG, offsetof(struct buffers, tail), 0, NULL},
    {"out", T_LONGLONG, offsetof(struct buffers, out), 0, NULL},
    {NULL},
};

static PyMethodDef buffers_methods[] = {
    {"copy", buffers_copy, METH_VARARGS, NULL},
    {NULL},
};

static PyType_Slot buffers_slots[] = {
    {Py_tp_dealloc, buffers_dealloc},
    {Py_tp_members, buffers_members},
    {Py_tp_methods, buffers_methods},
    {0, NULL},
};

static PyType_Spec buffers_spec = {
    .name = "trio_uring._native.Buffers",
    .basicsize = sizeof(struct buffers),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = buffers_slots,
};

/* Wait: what a coroutine awaits, once its operation is staged. It is made before that: nothing may fail afterwards. */

static PyObject *wait_for(struct slot *slot, struct buffers *buffers)
{
    struct wait *self = PyObject_GC_New(struct wait, wait_type);

    if (self == NULL)
        return NULL;
    Py_INCREF(slot);
    self->slot = slot;
    self->token = slot->token + TU_GENERATION;
    Py_XINCREF(buffers);
    self->buffers = buffers;
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

static int wait_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((struct wait *)self)->slot);
    Py_VISIT(((struct wait *)self)->buffers);
    return 0;
}

static int wait_clear(PyObject *self)
{
    Py_CLEAR(((struct wait *)self)->slot);
    Py_CLEAR(((struct wait *)self)->buffers);
    return 0;
}

/* Is it for the life that the slot is in, and has nobody let the task go? */
static bool waits(const struct wait *self)
{
    return self->slot != NULL && self->slot->token == self->token && !is_none(self->slot->task);
}

/* If the operation is still the coroutine's, the run was torn down. */
static int wait_give_up(struct wait *self)
{
    return !waits(self) || called(PyObject_CallMethodObjArgs((PyObject *)self->slot, name_abandon, NULL)) ? 0 : -1;
}

/* One that is dropped unawaited gives up, too: nobody will take the result. */
static void wait_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject *error, *value, *traceback;

    PyObject_GC_UnTrack(self);
    if (waits((struct wait *)self)) {
        PyErr_Fetch(&error, &value, &traceback);
        if (wait_give_up((struct wait *)self) < 0)
            PyErr_WriteUnraisable((PyObject *)type);
        PyErr_Restore(error, value, traceback);
    }
    wait_clear(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyObject *wait_itself(PyObject *self)
{
    Py_INCREF(self);
    return self;
}

static PyObject *wait_next(PyObject *self)
{
    if (waits((struct wait *)self))
        return given(((struct wait *)self)->slot->trap);
    PyErr_SetString(PyExc_RuntimeError, "this operation is over");
    return NULL;
}

static PyObject *pick_up(PyObject *slot);

/* What came with `res` into a buffer. What a negative number means is decided in Python. */
static PyObject *received(struct wait *self, PyObject *res)
{
    int64_t length, flags;
    PyObject *data, *done;

    if (!fits(res, INT32_MIN, INT32_MAX, &length) || !fits(self->slot->flags, 0, UINT32_MAX, &flags)) {
        PyErr_SetString(PyExc_SystemError, "a CQE without numbers");
        return NULL;
    }
    if (flags & IORING_CQE_F_BUFFER)
        data = copied(self->buffers, flags, length < 0 ? 0 : length);
    else
        data = PyBytes_FromStringAndSize(NULL, 0);
    if (data == NULL)
        return NULL;
    if (length < 0) {
        Py_DECREF(data);
        return PyObject_CallMethodObjArgs((PyObject *)self->slot, name_not_received, res, NULL);
    }
    done = pick_up((PyObject *)self->slot);
    if (done == NULL)
        Py_CLEAR(data);
    Py_XDECREF(done);
    return data;
}

/* The task is sent nothing at first; then the number that came, bare or in an outcome; or why there is none. */
static PySendResult wait_send_to(PyObject *self, PyObject *value, PyObject **result)
{
    struct wait *wait = (struct wait *)self;
    PyObject *res;

    if (value == Py_None) {
        *result = wait_next(self);
        return *result == NULL ? PYGEN_ERROR : PYGEN_NEXT;
    }
    res = PyLong_CheckExact(value) ? given(value) : PyObject_CallMethodObjArgs(value, name_unwrap, NULL);
    if (res == NULL || wait->buffers == NULL) {
        *result = res;
    } else {
        *result = received(wait, res);
        Py_DECREF(res);
    }
    return *result == NULL ? PYGEN_ERROR : PYGEN_RETURN;
}

static PyObject *wait_send(PyObject *self, PyObject *value)
{
    PyObject *result;

    switch (wait_send_to(self, value, &result)) {
    case PYGEN_NEXT:
        return result;
    case PYGEN_RETURN:
        PyErr_SetObject(PyExc_StopIteration, result);
        Py_DECREF(result);
        return NULL;
    default:
        return NULL;
    }
}

static PyObject *wait_throw(PyObject *self, PyObject *args)
{
    PyObject *type, *value = NULL, *traceback = NULL;

    if (!PyArg_ParseTuple(args, "O|OO", &type, &value, &traceback) || wait_give_up((struct wait *)self) < 0)
        return NULL;
    if (PyExceptionInstance_Check(type)) {
        PyErr_Restore(given((PyObject *)Py_TYPE(type)), given(type), PyException_GetTraceback(type));
    } else if (!PyExceptionClass_Check(type)) {
        PyErr_SetString(PyExc_TypeError, "what is thrown must be an exception");
    } else { /* as before Python 3.12 */
        Py_INCREF(type);
        Py_XINCREF(value);
        if (traceback == Py_None)
            traceback = NULL;
        Py_XINCREF(traceback);
        PyErr_Restore(type, value, traceback);
    }
    return NULL;
}

static PyObject *wait_close(PyObject *self, PyObject *nothing)
{
    (void)nothing;
    return wait_give_up((struct wait *)self) < 0 ? NULL : given(NULL);
}

static PyMethodDef wait_methods[] = {
    {"send", wait_send, METH_O, NULL},
    {"throw", wait_throw, METH_VARARGS, NULL},
    {"close", wait_close, METH_NOARGS, NULL},
    {NULL},
};

static PyType_Slot wait_slots[] = {
    {Py_tp_dealloc, wait_dealloc},
    {Py_tp_traverse, wait_traverse},
    {Py_tp_clear, wait_clear},
    {Py_tp_iter, wait_itself},
    {Py_tp_iternext, wait_next},
    {Py_am_await, wait_itself},
    {Py_am_send, wait_send_to},
    {Py_tp_methods, wait_methods},
    {0, NULL},
};

static PyType_Spec wait_spec = {
    .name = "trio_uring._native.Wait",
    .basicsize = sizeof(struct wait),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = wait_slots,
};

/* Slot */

static int slot_traverse(PyObject *object, visitproc visit, void *arg)
{
    struct slot *self = (struct slot *)object;

    Py_VISIT(Py_TYPE(object));
#define FIELD(name) Py_VISIT(self->name);
    SLOT_FIELDS(FIELD)
#undef FIELD
    return 0;
}

static int slot_clear(PyObject *object)
{
    struct slot *self = (struct slot *)object;

#define FIELD(name) Py_CLEAR(self->name);
    SLOT_FIELDS(FIELD)
#undef FIELD
    return 0;
}

static void slot_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_GC_UnTrack(self);
    slot_clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static bool number_of_kind(PyObject *kind, PyObject *name, int64_t *value)
{
    PyObject *attribute = PyObject_GetAttr(kind, name);
    bool good = attribute != NULL && fits(attribute, 0, UINT32_MAX, value);

    Py_XDECREF(attribute);
    PyErr_Clear();
    return good;
}

static bool truth_of_kind(PyObject *kind, PyObject *name)
{
    PyObject *attribute = PyObject_GetAttr(kind, name);
    bool truth = attribute == Py_True;

    Py_XDECREF(attribute);
    PyErr_Clear();
    return truth;
}

/* What a life begins with. */
struct beginning {
    PyObject *queue, *kind, *task, *siblings, *since, *fd, *pin, *keep;
    struct buffers *buffers;
    int64_t sqe_fd, off, addr, length, op_flags;
};

/* Where the kernel finds what is pinned. cffi knows that of its own objects; bytes stay where they are. */
static bool set_pointer(const struct queue *queue, long long index, PyObject *pin)
{
    const long long pointers = sizeof(struct io_uring_sqe) / sizeof(void *);
    const long long addr = offsetof(struct io_uring_sqe, addr) / sizeof(void *);
    PyObject *place = PyLong_FromLongLong(index * pointers + addr);
    bool good = place != NULL && PyObject_SetItem(queue->_pointers, place, pin) == 0;

    Py_XDECREF(place);
    PyErr_Clear();
    return good;
}

/*
 * IDLE -> STAGED: fills the SQE and takes hold of all that the kernel will use. Returns what the task is to await, or
 * None if there is something out of the ordinary; then nothing has happened.
 */
static PyObject *start(struct slot *self, const struct beginning *of)
{
    struct queue *queue = (struct queue *)of->queue;
    struct io_uring_sqe *sqe;
    PyObject *wait;
    int64_t head;
    long long index;

    if (!number_of_kind(of->kind, name_head, &head) || !PySet_Check(of->siblings))
        return given(NULL);
    wait = wait_for(self, of->buffers);
    if (wait == NULL)
        return NULL;
    if (!make_room(queue, (uint8_t)head, 1)) {
        Py_DECREF(wait);
        return NULL;
    }
    /* From here until the entry is ours nothing may collect garbage: a finaliser that stages would take it. */
    index = queue->tail - queue->base;
    sqe = entries_of(queue) + index;
    memset(sqe, 0, sizeof(*sqe));
    memcpy(sqe, &(uint32_t){(uint32_t)head}, sizeof(uint32_t)); /* opcode, flags, ioprio */
    sqe->fd = (int32_t)of->sqe_fd;
    sqe->off = (uint64_t)of->off;
    sqe->addr = (uint64_t)of->addr;
    sqe->len = (uint32_t)of->length;
    sqe->rw_flags = (int)(uint32_t)of->op_flags;
    sqe->user_data = (uint64_t)(self->token + TU_GENERATION);
    if (PyBytes_CheckExact(of->pin)) {
        sqe->addr = (uintptr_t)PyBytes_AsString(of->pin);
    } else if (of->pin != Py_None && !set_pointer(queue, index, of->pin)) {
        Py_DECREF(wait);
        return given(NULL);
    }
    if (PySet_Add(of->siblings, (PyObject *)self) < 0) {
        Py_DECREF(wait);
        return NULL;
    }
    self->token += TU_GENERATION;
    self->number = queue->tail++;
    self->ordinary = truth_of_kind(of->kind, name_ordinary);
    put(&self->_state, in_flight); /* or STAGED, as the ring has it */
    put(&self->task, of->task);
    put(&self->kind, of->kind);
    put(&self->fd, of->fd);
    put(&self->siblings, of->siblings);
    put(&self->since, of->since);
    put(&self->keep, of->keep);
    put(&self->pin, of->pin);
    return wait;
}

static bool is_queue(PyObject *object)
{
    if (PyObject_TypeCheck(object, queue_type))
        return true;
    PyErr_SetString(PyExc_TypeError, "the first argument must be a Queue");
    return false;
}

/* start(queue, kind, task, siblings, since, fd, sqe_fd, off, addr, length, op_flags, pin, keep) */
static PyObject *slot_start(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    struct beginning of;

    if (n != 13)
        return PyErr_Format(PyExc_TypeError, "start takes 13 arguments, not %zd", n);
    if (!is_queue(args[0]))
        return NULL;
    of = (struct beginning){.queue = args[0], .kind = args[1], .task = args[2], .siblings = args[3], .since = args[4],
                            .fd = args[5], .pin = args[11], .keep = args[12]};
    if (!fits(args[6], INT32_MIN, INT32_MAX, &of.sqe_fd) || !fits(args[7], INT64_MIN, INT64_MAX, &of.off) ||
        !fits(args[8], 0, INT64_MAX, &of.addr) || !fits(args[9], 0, UINT32_MAX, &of.length) ||
        !fits(args[10], 0, UINT32_MAX, &of.op_flags))
        return given(NULL);
    return start((struct slot *)self, &of);
}

/* receive(queue, kind, task, siblings, since, fd, size, buffers): the result is bytes; None if there is another way. */
static PyObject *slot_receive(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    struct beginning of;

    if (n != 8)
        return PyErr_Format(PyExc_TypeError, "receive takes 8 arguments, not %zd", n);
    if (!is_queue(args[0]))
        return NULL;
    if (!PyObject_TypeCheck(args[7], buffers_type))
        return PyErr_Format(PyExc_TypeError, "the last argument must be Buffers");
    of = (struct beginning){.queue = args[0], .kind = args[1], .task = args[2], .siblings = args[3], .since = args[4],
                            .fd = args[5], .pin = Py_None, .keep = Py_None, .buffers = (struct buffers *)args[7]};
    if (!fits(args[5], INT32_MIN, INT32_MAX, &of.sqe_fd) || !fits(args[6], 0, UINT32_MAX, &of.length))
        return given(NULL);
    return start((struct slot *)self, &of);
}

/* wait(buffers): what to await when the next life has begun, if it is to be begun otherwise. Buffers, or None. */
static PyObject *slot_wait(PyObject *self, PyObject *buffers)
{
    return wait_for((struct slot *)self, PyObject_TypeCheck(buffers, buffers_type) ? (struct buffers *)buffers : NULL);
}

/* SETTLED -> IDLE, and ready for the next one. */
static PyObject *pick_up(PyObject *object)
{
    struct slot *self = (struct slot *)object;
    int waited_for = self->waiters == NULL ? 0 : PyObject_IsTrue(self->waiters);

    if (waited_for < 0)
        return NULL;
    if (self->_state != settled)
        return PyObject_CallMethodObjArgs(object, name_pick_up_late, NULL);
    put(&self->_state, idle);
    if (waited_for || Py_TYPE(object) != operation_type)
        return PyObject_CallMethodObjArgs(object, name_let_go, NULL);
    put(&self->task, Py_None);
    put(&self->interrupt, Py_None);
    put(&self->keep, Py_None);
    put(&self->pin, Py_None);
    return PyList_Append(self->home, object) < 0 ? NULL : given(NULL);
}

static PyObject *slot_pick_up(PyObject *self, PyObject *nothing)
{
    (void)nothing;
    return pick_up(self);
}

/* Does the CQE mean just: IN_FLIGHT -> SETTLED, with a result? Then nothing can go wrong but for want of memory. */
static bool settles(const struct slot *self, int64_t token, int64_t res, int64_t flags)
{
    return token == self->token && res >= 0 && !(flags & IORING_CQE_F_MORE) && self->_state == in_flight &&
           self->ordinary && self->siblings && PySet_Check(self->siblings);
}

/* Wakes the task. What was pinned is let go of after that: giving it up can run any code, a cancel included. */
static int settle(struct slot *self, PyObject *res, PyObject *flags, PyObject *wake)
{
    PyObject *task = given(self->task), *pin = self->pin, *keep = NULL;
    bool good;

    if (PySet_Discard(self->siblings, (PyObject *)self) < 0) {
        Py_DECREF(task);
        return -1;
    }
    put(&self->_state, settled);
    put(&self->res, res);
    put(&self->flags, flags);
    self->pin = NULL; /* the kernel is done with it; `keep` may be what the result is made of */
    if (!is_none(self->keep) && !truth_of_kind(self->kind, name_keeps)) {
        keep = self->keep;
        self->keep = NULL;
    }
    good = called(PyObject_CallFunctionObjArgs(wake, task, res, NULL));
    Py_DECREF(task);
    Py_XDECREF(pin);
    Py_XDECREF(keep);
    return good ? 0 : -1;
}

static int complete(PyObject *slot, PyObject *const *cqe, PyObject *wake)
{
    int64_t token, res, flags;

    if (Py_TYPE(slot) == operation_type && fits(cqe[0], 0, INT64_MAX, &token) &&
        fits(cqe[1], INT32_MIN, INT32_MAX, &res) && fits(cqe[2], 0, UINT32_MAX, &flags) &&
        settles((struct slot *)slot, token, res, flags))
        return settle((struct slot *)slot, cqe[1], cqe[2], wake);
    return called(PyObject_CallMethodObjArgs(slot, name_complete, cqe[0], cqe[1], cqe[2], NULL)) ? 0 : -1;
}

/* complete_all(slots, cqes, wake): `cqes` is an iterator over numbers, three for each CQE. It can be gone on with. */
static PyObject *complete_all(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    (void)module;
    if (n != 3) {
        PyErr_SetString(PyExc_TypeError, "complete_all(slots, cqes, wake)");
        return NULL;
    }
    for (;;) {
        PyObject *cqe[3], *slot = NULL;
        int got = 0, failed = -1;

        while (got < 3 && (cqe[got] = PyIter_Next(args[1])) != NULL)
            got++;
        if (got == 3) {
            int64_t token = PyLong_AsLongLong(cqe[0]);

            if (token != -1 || !PyErr_Occurred())
                slot = PyList_GetItem(args[0], (Py_ssize_t)(token & TU_SLOT));
        }
        if (slot != NULL) {
            Py_INCREF(slot);
            failed = complete(slot, cqe, args[2]);
            Py_DECREF(slot);
        }
        while (got > 0)
            Py_DECREF(cqe[--got]);
        if (failed)
            return PyErr_Occurred() ? NULL : given(NULL);
    }
}

static PyMemberDef slot_members[] = {
    {"token", T_LONGLONG, offsetof(struct slot, token), 0, NULL},
    {"number", T_LONGLONG, offsetof(struct slot, number), 0, NULL},
    {"ordinary", T_BOOL, offsetof(struct slot, ordinary), 0, NULL},
#define FIELD(name) {#name, T_OBJECT, offsetof(struct slot, name), 0, NULL},
    SLOT_FIELDS(FIELD)
#undef FIELD
    {NULL},
};

static PyMethodDef slot_methods[] = {
    {"start", (PyCFunction)(void *)slot_start, METH_FASTCALL, NULL},
    {"receive", (PyCFunction)(void *)slot_receive, METH_FASTCALL, NULL},
    {"wait", slot_wait, METH_O, NULL},
    {"pick_up", slot_pick_up, METH_NOARGS, NULL},
    {NULL},
};

static PyType_Slot slot_slots[] = {
    {Py_tp_dealloc, slot_dealloc},
    {Py_tp_traverse, slot_traverse},
    {Py_tp_clear, slot_clear},
    {Py_tp_members, slot_members},
    {Py_tp_methods, slot_methods},
    {0, NULL},
};

static PyType_Spec slot_spec = {
    .name = "trio_uring._native.Slot",
    .basicsize = sizeof(struct slot),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slot_slots,
};

/* introduce(operation, idle, in_flight, settled): the class of plain operations, and states. */
static PyObject *introduce(PyObject *module, PyObject *args)
{
    PyObject *operation, *states[3];

    (void)module;
    if (!PyArg_ParseTuple(args, "O!OOO", &PyType_Type, &operation, &states[0], &states[1], &states[2]))
        return NULL;
    put((PyObject **)&operation_type, operation);
    put(&idle, states[0]);
    put(&in_flight, states[1]);
    put(&settled, states[2]);
    return given(NULL);
}

static PyMethodDef functions[] = {
    {"complete_all", (PyCFunction)(void *)complete_all, METH_FASTCALL, NULL},
    {"introduce", introduce, METH_VARARGS, NULL},
    {NULL},
};

static const struct {
    PyObject **name;
    const char *chars;
} names[] = {
    {&name_head, "head"},       {&name_ordinary, "ordinary"}, {&name_keeps, "keeps"},
    {&name_complete, "complete"}, {&name_abandon, "abandon"}, {&name_unwrap, "unwrap"},
    {&name_let_go, "_let_go"},  {&name_pick_up_late, "_pick_up_late"},
    {&name_grow, "_grow"},      {&name_not_received, "_not_received"},
};

static bool add(PyObject *namespace, const char *name, PyTypeObject *type)
{
    return type != NULL && PyDict_SetItemString(namespace, name, (PyObject *)type) == 0;
}

static bool add_function(PyObject *namespace, PyMethodDef *definition)
{
    PyObject *function = PyCFunction_New(definition, NULL);
    bool good = function != NULL && PyDict_SetItemString(namespace, definition->ml_name, function) == 0;

    Py_XDECREF(function);
    return good;
}

static PyTypeObject *made(PyType_Spec *spec)
{
    return (PyTypeObject *)PyType_FromSpec(spec);
}

/* Puts the types and functions into a dict. False, with what is wrong printed, if that fails. */
int tu_add_types(const void *dict)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *namespace = (PyObject *)dict;
    bool good = true;

    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        good = (*names[i].name = PyUnicode_InternFromString(names[i].chars)) != NULL && good;
    if (queue_type == NULL) { /* once: a run may be under way when the package is imported again */
        queue_type = made(&queue_spec);
        buffers_type = made(&buffers_spec);
        wait_type = made(&wait_spec);
        slot_type = made(&slot_spec);
    }
    good = good && add(namespace, "Queue", queue_type) && add(namespace, "Buffers", buffers_type) &&
           add(namespace, "Wait", wait_type) && add(namespace, "Slot", slot_type);
    for (PyMethodDef *function = functions; function->ml_name != NULL; function++)
        good = good && add_function(namespace, function);
    if (PyErr_Occurred())
        PyErr_Print();
    PyGILState_Release(gil);
    return good;
}
