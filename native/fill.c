/*
 * SQEs from rows of Python arguments: many operations of one kind, without a Python frame for each.
 *
 * Facts that decide its shape:
 *
 * - In Python a 4 KiB read costs three times what the kernel needs for it; most of that is the call that takes its
 *   arguments and the objects that hold its buffer. Here it is some 50 ns.
 * - A buffer is held by a real export until the kernel is done, as everywhere in this library: an array of them belongs
 *   to the rows, and goes with them.
 * - Only what is ordinary is done here: ints that fit their fields, buffers, names that are str or bytes, and none of a
 *   subclass, which may have ideas of its own. Anything else stops it, and the Python way, which does the same, raises
 *   the error or knows better.
 * - cffi releases the GIL around a call and does not pass Python objects. So these functions take it back, and are given
 *   addresses of objects that the caller holds.
 *
 * The letters of a form, one for each positional argument:  F fd,  W writable buffer,  R readable buffer,  P file name,
 * O off,  L len,  G operation flags (added to those of the blank entry),  D the same without O_CLOEXEC, which a direct
 * descriptor must not have. What follows | may be missing.
 */

#include <fcntl.h>

#if defined(Py_LIMITED_API) && Py_LIMITED_API + 0 < 0x030b0000
/* In the stable ABI since Python 3.11, with the layout and the exports that 3.10 has. */
typedef struct {
    void *buf;
    PyObject *obj;
    Py_ssize_t len;
    Py_ssize_t itemsize;
    int readonly;
    int ndim;
    char *format;
    Py_ssize_t *shape;
    Py_ssize_t *strides;
    Py_ssize_t *suboffsets;
    void *internal;
} tu_export;

extern int PyObject_GetBuffer(PyObject *exporter, tu_export *view, int flags);
extern void PyBuffer_Release(tu_export *view);
#define PyBUF_SIMPLE 0
#define PyBUF_WRITABLE 1
#else /* a debug build of Python has no limited API */
typedef Py_buffer tu_export;
#endif

struct tu_pins {
    unsigned n;
    tu_export exports[];
};

struct tu_pins *tu_new_pins(unsigned n)
{
    struct tu_pins *pins = calloc(1, sizeof(*pins) + n * sizeof(tu_export));

    if (pins != NULL)
        pins->n = n;
    return pins;
}

void tu_free_pins(struct tu_pins *pins)
{
    PyGILState_STATE gil = PyGILState_Ensure();

    for (unsigned i = 0; i < pins->n; i++)
        PyBuffer_Release(&pins->exports[i]);
    PyGILState_Release(gil);
    free(pins);
}

static bool integer(PyObject *argument, int64_t lowest, int64_t highest, int64_t *value)
{
    if (!PyLong_CheckExact(argument))
        return false;
    *value = PyLong_AsLongLong(argument);
    return (*value != -1 || !PyErr_Occurred()) && lowest <= *value && *value <= highest;
}

static bool buffer(PyObject *argument, int flags, struct io_uring_sqe *sqe, tu_export *export)
{
    if (PyObject_GetBuffer(argument, export, flags) < 0)
        return false;
    sqe->addr = (uintptr_t)export->buf;
    sqe->len = export->len < TU_MAX_RW_COUNT ? (uint32_t)export->len : TU_MAX_RW_COUNT;
    return true;
}

static bool file_name(PyObject *argument, struct io_uring_sqe *sqe, tu_export *export)
{
    PyObject *raw;
    char *chars;
    bool good;

    if (PyBytes_CheckExact(argument)) {
        raw = argument;
        Py_INCREF(raw);
    } else if (PyUnicode_CheckExact(argument)) {
        raw = PyUnicode_EncodeFSDefault(argument);
    } else {
        return false;
    }
    good = raw != NULL && PyBytes_AsStringAndSize(raw, &chars, NULL) == 0 /* no null byte in it */
        && PyObject_GetBuffer(raw, export, PyBUF_SIMPLE) == 0;
    Py_XDECREF(raw);
    if (good)
        sqe->addr = (uintptr_t)export->buf;
    return good;
}

static bool fill_one(struct io_uring_sqe *sqe, const char *form, PyObject *row, const void *file, tu_export *export)
{
    Py_ssize_t at = 0, n = PyTuple_CheckExact(row) ? PyTuple_Size(row) : -1;
    bool optional = false;
    int64_t value;

    for (; *form; form++) {
        PyObject *argument;
        bool good = true;

        if (*form == '|') {
            optional = true;
            continue;
        }
        if (at >= n)
            return at == n && optional;
        argument = PyTuple_GetItem(row, at++);
        switch (*form) {
        case 'F':
            if (file != NULL)
                good = argument == file; /* its place is not known yet */
            else if ((good = integer(argument, INT32_MIN, INT32_MAX, &value)))
                sqe->fd = (int32_t)value;
            break;
        case 'W':
            good = buffer(argument, PyBUF_WRITABLE, sqe, export);
            break;
        case 'R':
            good = buffer(argument, PyBUF_SIMPLE, sqe, export);
            break;
        case 'P':
            good = file_name(argument, sqe, export);
            break;
        case 'O':
            if ((good = integer(argument, INT64_MIN, INT64_MAX, &value)))
                sqe->off = (uint64_t)value;
            break;
        case 'L':
            if ((good = integer(argument, 0, UINT32_MAX, &value)))
                sqe->len = (uint32_t)value;
            break;
        case 'D':
            if ((good = integer(argument, 0, UINT32_MAX, &value)))
                sqe->open_flags |= (uint32_t)value & ~(uint32_t)O_CLOEXEC;
            break;
        default:
            if ((good = integer(argument, 0, UINT32_MAX, &value)))
                sqe->rw_flags |= (int)(uint32_t)value;
        }
        if (!good)
            return false;
    }
    return at == n;
}

/*
 * Fills `sqes`, one for each tuple of `rows`, a list of as many as `pins` has room for. `blank` is an entry with what
 * they have in common. `file`, if not NULL, is the object that stands for the fd in every row. False if something is
 * out of the ordinary.
 */
int tu_fill(void *sqes, const void *blank, const char *form, const void *rows, const void *file, struct tu_pins *pins)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *list = (PyObject *)rows;
    struct io_uring_sqe *sqe = sqes;
    bool good = PyList_Size(list) == (Py_ssize_t)pins->n;

    for (unsigned i = 0; good && i < pins->n; i++) {
        memcpy(&sqe[i], blank, sizeof(*sqe));
        good = fill_one(&sqe[i], form, PyList_GetItem(list, i), file, &pins->exports[i]);
    }
    if (PyErr_Occurred()) {
        /* The Python way raises it again, but not what a signal handler has raised. */
        if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt))
            PyErr_SetInterrupt();
        PyErr_Clear();
    }
    PyGILState_Release(gil);
    return good;
}

/*
 * Puts one step of `n` chains of `steps` steps each among the others. `places`, one for each chain, are direct
 * descriptors: those that the step opens, or those that it uses.
 */
void tu_weave(void *woven, const void *sqes, unsigned n, unsigned steps, unsigned step, unsigned link,
              const int32_t *opened, const int32_t *used)
{
    struct io_uring_sqe *to = (struct io_uring_sqe *)woven + step;
    const struct io_uring_sqe *from = sqes;

    for (unsigned i = 0; i < n; i++, to += steps) {
        memcpy(to, &from[i], sizeof(*to));
        to->flags |= link;
        if (opened != NULL)
            to->file_index = opened[i] + 1;
        if (used != NULL) {
            to->fd = used[i];
            to->flags |= IOSQE_FIXED_FILE;
        }
    }
}
