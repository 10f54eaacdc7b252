/*
 * Batches of streams: taking items from an iterator, and pickling many small ones.
 *
 * A stream sends up to 8192 items at a time (see _streams.py), so the call that carries them counts for little,
 * and what is done for each of them counts.  In Python the loop that takes them takes 0.06 us an item, and
 * `pickle.dumps` 0.05 more for a string, for a memo that nobody looks into again.
 *
 * What is written here is an ordinary pickle of protocol 5, which any unpickler reads (and what is read here is
 * only what is written here; all else is left to pickle, as in _atoms.c):
 *
 *     80 05 5d 28 <item>... 65 2e
 *
 * where an item is None, a boolean, a number, a text, bytes, or a tuple of these.  Of any other item the whole batch
 * is for pickle.  What is not kept: that two items were the same object, which are immutable.
 *
 * Nothing here runs anybody's code but the iterator's own, which may do anything, and another thread may take items
 * out of the list meanwhile (the watcher of _streams.py does).  So nothing is remembered about the list
 * across a step of it.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define MOST_BYTES (1 << 20) /* of a pickle; a batch has a quarter of that, and its last item */

/* -- taking ------------------------------------------------------------------------------------ */

static double
now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Roughly what an item weighs in a message; -1 if Python has to say that. */
static Py_ssize_t
weight_of(PyObject *item)
{
    if (PyUnicode_CheckExact(item))
        return PyUnicode_GET_LENGTH(item);
    if (PyBytes_CheckExact(item))
        return PyBytes_GET_SIZE(item);
    return PyLong_CheckExact(item) || PyFloat_CheckExact(item) || PyBool_Check(item) || item == Py_None ? 0 : -1;
}

/* Take one item; false with an exception set, be it `StopIteration`. */
static bool
take_one(PyObject *items, PyObject *iterator, Py_ssize_t *weight, bool weigh)
{
    PyObject *item = Py_TYPE(iterator)->tp_iternext(iterator);
    int failed;

    if (item == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetNone(PyExc_StopIteration);
        return false;
    }
    if (weigh)
        *weight = weight_of(item);
    failed = PyList_Append(items, item);
    Py_DECREF(item);
    return failed == 0;
}

PyDoc_STRVAR(take_items_doc,
"take_items(items, iterator, count, stride, room, until)\n--\n\n"
"Append up to `count` items of an iterator to a list; return `(taken, room)`.\n\n"
"After every `stride` items it looks whether to go on: not when `until` is over, by the monotonic clock, when\n"
"their bytes have used up the room, or at an item of which only Python can say how long it is.\n\n"
"Raises:\n"
"    StopIteration: with what a generator returns; the items before it are in the list.\n"
"    Exception: what the iterator raises; likewise.");

static PyObject *
batches_take_items(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *items, *iterator;
    Py_ssize_t count, stride, room, weight = 0, taken = 0;
    double until;

    if (!PyArg_ParseTuple(args, "O!Onnnd", &PyList_Type, &items, &iterator, &count, &stride, &room, &until))
        return NULL;
    if (!PyIter_Check(iterator) || stride < 1)
        return PyErr_Format(PyExc_TypeError, "take_items() takes an iterator, and a stride of one or more");
    while (taken < count) {
        bool look = (taken + 1) % stride == 0;
        if (!take_one(items, iterator, &weight, look))
            return NULL;
        taken++;
        if (!look)
            continue;
        if (weight < 0)
            break;
        /* No product: it might be longer than a number. */
        room = weight > room / stride ? -1 : room - weight * stride;
        if (room < 0 || now() > until)
            break;
    }
    return Py_BuildValue("nn", taken, room);
}

/* -- writing ----------------------------------------------------------------------------------- */

/* The codes of pickle that are used here; see Lib/pickletools.py. */
enum {
    PROTO = 0x80,
    PROTOCOL = 5,
    STOP = '.',
    MARK = '(',
    NONE = 'N',
    NEWTRUE = 0x88,
    NEWFALSE = 0x89,
    BININT = 'J',
    BININT1 = 'K',
    BININT2 = 'M',
    LONG1 = 0x8a,
    BINFLOAT = 'G',
    SHORT_BINUNICODE = 0x8c,
    BINUNICODE = 'X',
    SHORT_BINBYTES = 'C',
    BINBYTES = 'B',
    EMPTY_TUPLE = ')',
    TUPLE1 = 0x85,
    TUPLE = 't',
    EMPTY_LIST = ']',
    APPENDS = 'e',
};

struct writer {
    uint8_t *bytes;
    size_t size, room;
};

/* Have room for so many bytes more. */
static bool
make_room(struct writer *w, size_t size)
{
    size_t room = w->room;
    uint8_t *bytes;

    if (size <= room - w->size)
        return true;
    if (size > MOST_BYTES - w->size)
        return false;
    while (size > room - w->size)
        room *= 2;
    if ((bytes = PyMem_Realloc(w->bytes, room)) == NULL)
        return false;
    w->bytes = bytes;
    w->room = room;
    return true;
}

static bool
put_code(struct writer *w, unsigned code)
{
    if (!make_room(w, 1))
        return false;
    w->bytes[w->size++] = (uint8_t)code;
    return true;
}

/* A code, and behind it the lowest bytes of a number, the lowest first. */
static bool
put_number(struct writer *w, unsigned code, uint64_t number, size_t size)
{
    if (!make_room(w, 1 + size))
        return false;
    w->bytes[w->size++] = (uint8_t)code;
    for (size_t i = 0; i < size; i++)
        w->bytes[w->size++] = (uint8_t)(number >> 8 * i);
    return true;
}

static bool
put_int(struct writer *w, PyObject *value)
{
    int overflow;
    long long number = PyLong_AsLongLongAndOverflow(value, &overflow);

    if (overflow)
        return false;
    if (number >= 0 && number <= UINT8_MAX)
        return put_number(w, BININT1, (uint64_t)number, 1);
    if (number >= 0 && number <= UINT16_MAX)
        return put_number(w, BININT2, (uint64_t)number, 2);
    if (number >= INT32_MIN && number <= INT32_MAX)
        return put_number(w, BININT, (uint64_t)number, 4);
    return put_code(w, LONG1) && put_number(w, 8, (uint64_t)number, 8);
}

static bool
put_float(struct writer *w, PyObject *value)
{
    double number = PyFloat_AS_DOUBLE(value);
    uint64_t bits;

    memcpy(&bits, &number, sizeof bits);
    if (!make_room(w, 9))
        return false;
    w->bytes[w->size++] = BINFLOAT;
    for (int shift = 56; shift >= 0; shift -= 8)
        w->bytes[w->size++] = (uint8_t)(bits >> shift);
    return true;
}

/* A code for short ones or another for longer ones, the length, and the bytes. */
static bool
put_string(struct writer *w, unsigned brief, unsigned code, const char *from, Py_ssize_t size)
{
    if (from == NULL || size > MOST_BYTES)
        return false;
    if (!(size <= UINT8_MAX ? put_number(w, brief, (uint64_t)size, 1) : put_number(w, code, (uint64_t)size, 4)))
        return false;
    if (!make_room(w, (size_t)size))
        return false;
    memcpy(w->bytes + w->size, from, (size_t)size);
    w->size += (size_t)size;
    return true;
}

static bool
put_text(struct writer *w, PyObject *value)
{
    Py_ssize_t size;
    const char *from = PyUnicode_AsUTF8AndSize(value, &size); /* not of a lone surrogate */
    return put_string(w, SHORT_BINUNICODE, BINUNICODE, from, size);
}

/* Write a value that is no container; false if it is none of these, or there is no room. */
static bool
put_value(struct writer *w, PyObject *value)
{
    if (PyUnicode_CheckExact(value))
        return put_text(w, value);
    if (PyLong_CheckExact(value))
        return put_int(w, value);
    if (PyFloat_CheckExact(value))
        return put_float(w, value);
    if (value == Py_None)
        return put_code(w, NONE);
    if (PyBool_Check(value))
        return put_code(w, value == Py_True ? NEWTRUE : NEWFALSE);
    return PyBytes_CheckExact(value)
           && put_string(w, SHORT_BINBYTES, BINBYTES, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value));
}

static bool
put_tuple(struct writer *w, PyObject *tuple)
{
    Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    bool few = count <= 3;

    if (!few && !put_code(w, MARK))
        return false;
    for (Py_ssize_t i = 0; i < count; i++)
        if (!put_value(w, PyTuple_GET_ITEM(tuple, i)))
            return false;
    return put_code(w, count == 0 ? EMPTY_TUPLE : few ? TUPLE1 + (unsigned)count - 1 : TUPLE);
}

static bool
put_items(struct writer *w, PyObject *items)
{
    if (!put_number(w, PROTO, PROTOCOL, 1) || !put_code(w, EMPTY_LIST) || !put_code(w, MARK))
        return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items); i++) {
        PyObject *item = PyTuple_GET_ITEM(items, i);
        if (!(PyTuple_CheckExact(item) ? put_tuple(w, item) : put_value(w, item)))
            return false;
    }
    return put_code(w, APPENDS) && put_code(w, STOP);
}

PyDoc_STRVAR(pack_items_doc,
"pack_items(items)\n--\n\n"
"Pickle a list of items; None if it is for pickle.");

static PyObject *
batches_pack_items(PyObject *Py_UNUSED(module), PyObject *list)
{
    struct writer w = {NULL, 0, 1024};
    PyObject *items, *result = NULL;

    if (!PyList_CheckExact(list))
        return PyErr_Format(PyExc_TypeError, "pack_items() takes a list");
    if ((items = PyList_AsTuple(list)) == NULL) /* a list may be written to where there is no lock */
        return NULL;
    w.bytes = PyMem_Malloc(w.room);
    if (w.bytes != NULL && put_items(&w, items))
        result = PyBytes_FromStringAndSize((const char *)w.bytes, (Py_ssize_t)w.size);
    PyErr_Clear(); /* of what cannot be written, pickle says why */
    PyMem_Free(w.bytes);
    Py_DECREF(items);
    return result != NULL ? result : Py_NewRef(Py_None);
}

/* -- reading ----------------------------------------------------------------------------------- */

/* What was read: the items, and at the end of them those of the tuple that is being read. */
struct reader {
    const uint8_t *next, *end;
    PyObject **values;
    Py_ssize_t count, room;
    Py_ssize_t mark; /* the count at a MARK that is open; -1 */
};

static bool
push(struct reader *r, PyObject *value)
{
    if (value == NULL)
        return false;
    if (r->count == r->room) {
        /* Not PyMem_Resize, which forgets the old ones. */
        PyObject **values = PyMem_Realloc(r->values, (size_t)r->room * 2 * sizeof *values);
        if (values == NULL) {
            Py_DECREF(value);
            return false;
        }
        r->values = values;
        r->room *= 2;
    }
    r->values[r->count++] = value;
    return true;
}

/* So many bytes, or NULL. */
static const uint8_t *
take(struct reader *r, size_t size)
{
    const uint8_t *at = r->next;
    if (size > (size_t)(r->end - at))
        return NULL;
    r->next += size;
    return at;
}

/* A number of so many bytes, the lowest first. */
static bool
take_number(struct reader *r, size_t size, uint64_t *number)
{
    const uint8_t *at = take(r, size);

    if (at == NULL)
        return false;
    *number = 0;
    for (size_t i = 0; i < size; i++)
        *number |= (uint64_t)at[i] << 8 * i;
    return true;
}

static bool
read_int(struct reader *r, size_t size)
{
    uint64_t number;

    if (!take_number(r, size, &number))
        return false;
    if (size == 4 && number >> 31) /* the only one of these that may be negative, but for the longest */
        number |= UINT64_MAX << 32;
    return push(r, PyLong_FromLongLong((long long)number));
}

static bool
read_float(struct reader *r)
{
    const uint8_t *at = take(r, 8);
    uint64_t bits = 0;
    double number;

    if (at == NULL)
        return false;
    for (int i = 0; i < 8; i++)
        bits = bits << 8 | at[i];
    memcpy(&number, &bits, sizeof number);
    return push(r, PyFloat_FromDouble(number));
}

/* A string behind its length, which has so many bytes. */
static bool
read_string(struct reader *r, size_t width, bool is_text)
{
    uint64_t size;
    const char *at;

    if (!take_number(r, width, &size) || (at = (const char *)take(r, (size_t)size)) == NULL)
        return false;
    return push(r, is_text ? PyUnicode_DecodeUTF8(at, (Py_ssize_t)size, NULL)
                           : PyBytes_FromStringAndSize(at, (Py_ssize_t)size));
}

/* Have a tuple take the place of the values from `from` on. */
static bool
read_tuple(struct reader *r, Py_ssize_t from)
{
    PyObject *tuple;

    if (from < 0 || from < r->mark || (tuple = PyTuple_New(r->count - from)) == NULL)
        return false;
    for (Py_ssize_t i = from; i < r->count; i++) {
        PyTuple_SET_ITEM(tuple, i - from, r->values[i]);
    }
    r->count = from;
    return push(r, tuple);
}

static bool
set_mark(struct reader *r)
{
    if (r->mark >= 0)
        return false;
    r->mark = r->count;
    return true;
}

static bool
read_marked(struct reader *r)
{
    Py_ssize_t from = r->mark;
    r->mark = -1;
    return read_tuple(r, from);
}

/* Do what one code says; false if it is none of ours. */
static bool
read_one(struct reader *r, uint8_t code)
{
    uint64_t size;

    switch (code) {
    case BININT1:
        return read_int(r, 1);
    case BININT2:
        return read_int(r, 2);
    case BININT:
        return read_int(r, 4);
    case LONG1:
        return take_number(r, 1, &size) && size == 8 && read_int(r, 8);
    case BINFLOAT:
        return read_float(r);
    case SHORT_BINUNICODE:
        return read_string(r, 1, true);
    case BINUNICODE:
        return read_string(r, 4, true);
    case SHORT_BINBYTES:
        return read_string(r, 1, false);
    case BINBYTES:
        return read_string(r, 4, false);
    case NONE:
        return push(r, Py_NewRef(Py_None));
    case NEWTRUE:
        return push(r, Py_NewRef(Py_True));
    case NEWFALSE:
        return push(r, Py_NewRef(Py_False));
    case EMPTY_TUPLE:
        return push(r, PyTuple_New(0));
    case TUPLE1:
    case TUPLE1 + 1:
    case TUPLE1 + 2:
        return read_tuple(r, r->count - (code - TUPLE1 + 1));
    case MARK:
        return set_mark(r);
    case TUPLE:
        return read_marked(r);
    default:
        return false;
    }
}

static PyObject *
list_of(struct reader *r)
{
    PyObject *list = PyList_New(r->count);

    if (list == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < r->count; i++) {
        PyList_SET_ITEM(list, i, r->values[i]);
    }
    r->count = 0;
    return list;
}

/* Read a batch; NULL, without an exception, if it is none that is written here.  For _atoms.c, too. */
PyObject *doorpool_read_batch(const uint8_t *bytes, Py_ssize_t size);

PyObject *
doorpool_read_batch(const uint8_t *bytes, Py_ssize_t size)
{
    static const uint8_t begin[] = {PROTO, PROTOCOL, EMPTY_LIST, MARK}, end[] = {APPENDS, STOP};
    struct reader r = {bytes + sizeof begin, bytes + size - sizeof end, NULL, 0, 64, -1};
    PyObject *list = NULL;
    bool ours;

    if (size < (Py_ssize_t)(sizeof begin + sizeof end) || memcmp(bytes, begin, sizeof begin) != 0
        || memcmp(r.end, end, sizeof end) != 0)
        return NULL;
    r.values = PyMem_New(PyObject *, (size_t)r.room);
    ours = r.values != NULL;
    while (ours && r.next < r.end)
        ours = read_one(&r, *r.next++);
    if (ours && r.mark < 0)
        list = list_of(&r);
    while (r.count > 0)
        Py_DECREF(r.values[--r.count]);
    PyMem_Free(r.values);
    PyErr_Clear(); /* what went wrong, pickle says better */
    return list;
}

PyMethodDef doorpool_batches_methods[] = {
    {"take_items", batches_take_items, METH_VARARGS, take_items_doc},
    {"pack_items", batches_pack_items, METH_O, pack_items_doc},
    {NULL, NULL, 0, NULL},
};
