/*
 * Pickling what most calls consist of: None, booleans, numbers, short ASCII strings and bytes, and a few
 * tuples, lists and dicts of them.
 *
 * `pickle.dumps` makes a pickler, with a memo and a frame, and throws it away; `loads` likewise.  For two
 * numbers that takes 0.2 us each, and a call does it four times.  What is written here is an ordinary
 * pickle of protocol 5, which any unpickler reads; what is read here is only what is written here, and
 * all else is left to pickle.  So neither side need know whether the other has this.
 *
 *     80 05 <value> 2e         a value
 *     28 ... 74, 29, 85, 86, 87  a tuple, the latter four of up to three, as pickle writes it
 *     5d 28 ... 65             a list
 *     7d, 7d 28 ... 75         a dict
 *
 * Nothing here ever runs anybody's code or imports anything: neither methods of a value, which are of
 * exactly these types, nor what a pickle names, for there is no code for names.  Keys are hashed, and are of
 * these types, too.  One thing is not kept: that two strings were the same object, which are immutable.
 * A container that is met twice is for pickle.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define MOST_BYTES 4096 /* of a pickle: in longer ones the copying counts, and not what is saved here */
#define MOST_VALUES 512 /* that a reader has in hand at a time */
#define MOST_CONTAINERS 16
#define SHORT 255       /* bytes of a string whose length is one byte */
#define LONG_LIST 512   /* bytes from which a list is looked at as a batch of a stream first */

PyObject *doorpool_read_batch(const uint8_t *bytes, Py_ssize_t size); /* of _batches.c */

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
    SHORT_BINBYTES = 'C',
    EMPTY_TUPLE = ')',
    TUPLE1 = 0x85,
    TUPLE2 = 0x86,
    TUPLE3 = 0x87,
    TUPLE = 't',
    EMPTY_DICT = '}',
    SETITEMS = 'u',
    EMPTY_LIST = ']',
    APPENDS = 'e',
};

/* -- writing ----------------------------------------------------------------------------------- */

struct writer {
    int containers;
    PyObject *seen[MOST_CONTAINERS];
    size_t size;
    uint8_t bytes[MOST_BYTES];
};

static bool
put_code(struct writer *w, unsigned code)
{
    if (w->size >= MOST_BYTES)
        return false;
    w->bytes[w->size++] = (uint8_t)code;
    return true;
}

static bool
put_bytes(struct writer *w, const void *from, size_t size)
{
    if (size > MOST_BYTES - w->size)
        return false;
    memcpy(w->bytes + w->size, from, size);
    w->size += size;
    return true;
}

/* The lowest bytes of a number, the lowest first. */
static bool
put_number(struct writer *w, unsigned code, uint64_t number, size_t size)
{
    uint8_t bytes[8];
    for (size_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)(number >> 8 * i);
    return put_code(w, code) && put_bytes(w, bytes, size);
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
    if (!put_code(w, BINFLOAT))
        return false;
    for (int shift = 56; shift >= 0; shift -= 8)
        if (!put_code(w, (unsigned)(bits >> shift & 0xff)))
            return false;
    return true;
}

static bool
put_short(struct writer *w, unsigned code, const void *from, Py_ssize_t size)
{
    return size <= SHORT && put_number(w, code, (uint64_t)size, 1) && put_bytes(w, from, (size_t)size);
}

/* Write a value; false if it is none of these, or there is no room. */
static bool
put_value(struct writer *w, PyObject *value)
{
    if (PyLong_CheckExact(value))
        return put_int(w, value);
    if (PyUnicode_CheckExact(value))
        return PyUnicode_IS_COMPACT_ASCII(value)
               && put_short(w, SHORT_BINUNICODE, PyUnicode_1BYTE_DATA(value), PyUnicode_GET_LENGTH(value));
    if (value == Py_None)
        return put_code(w, NONE);
    if (PyBool_Check(value))
        return put_code(w, value == Py_True ? NEWTRUE : NEWFALSE);
    if (PyFloat_CheckExact(value))
        return put_float(w, value);
    return PyBytes_CheckExact(value) && put_short(w, SHORT_BINBYTES, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value));
}

/*
 * Tell whether a container is met for the first time, and there is room for it.  One that is met again
 * holds itself, or must be one object over there, too: that is for pickle, which keeps a memo.
 */
static bool
is_new(struct writer *w, PyObject *container)
{
    for (int i = 0; i < w->containers; i++)
        if (w->seen[i] == container)
            return false;
    if (w->containers == MOST_CONTAINERS)
        return false;
    w->seen[w->containers++] = container;
    return true;
}

static bool put_item(struct writer *w, PyObject *value);

static bool
put_tuple(struct writer *w, PyObject *tuple)
{
    static const uint8_t codes[] = {EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3};
    Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    bool few = count <= 3;

    if (count > 0 && !is_new(w, tuple)) /* there is but one empty one */
        return false;
    if (!few && !put_code(w, MARK))
        return false;
    for (Py_ssize_t i = 0; i < count; i++)
        if (!put_item(w, PyTuple_GET_ITEM(tuple, i)))
            return false;
    return put_code(w, few ? codes[count] : TUPLE);
}

#ifndef Py_GIL_DISABLED /* where another thread may write to it meanwhile */
static bool
put_list(struct writer *w, PyObject *list)
{
    if (!is_new(w, list) || !put_code(w, EMPTY_LIST) || !put_code(w, MARK))
        return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++)
        if (!put_item(w, PyList_GET_ITEM(list, i)))
            return false;
    return put_code(w, APPENDS);
}
#endif

static bool
put_dict(struct writer *w, PyObject *dict)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;

    if (!is_new(w, dict) || !put_code(w, EMPTY_DICT))
        return false;
    if (PyDict_GET_SIZE(dict) == 0)
        return true;
    if (!put_code(w, MARK))
        return false;
    while (PyDict_Next(dict, &at, &key, &value))
        if (!put_value(w, key) || !put_item(w, value))
            return false;
    return put_code(w, SETITEMS);
}

/* Write a value or a container; nothing here runs anybody's code, so none of them changes meanwhile. */
static bool
put_item(struct writer *w, PyObject *value)
{
    if (put_value(w, value))
        return true;
    if (PyTuple_CheckExact(value))
        return put_tuple(w, value);
#ifndef Py_GIL_DISABLED
    if (PyList_CheckExact(value))
        return put_list(w, value);
    if (PyDict_CheckExact(value))
        return put_dict(w, value);
#endif
    return false;
}

static void
begin(struct writer *w)
{
    w->containers = 0;
    w->bytes[0] = PROTO;
    w->bytes[1] = PROTOCOL;
    w->size = 2;
}

/* -- reading ----------------------------------------------------------------------------------- */

/* What was read, on a stack as an unpickler has it. */
struct reader {
    const uint8_t *next, *end;
    PyObject *stack[MOST_VALUES];
    Py_ssize_t height;
    Py_ssize_t marks[MOST_CONTAINERS]; /* the heights at each MARK that is open */
    int open;
};

static bool
push(struct reader *r, PyObject *value)
{
    if (value == NULL)
        return false;
    if (r->height == MOST_VALUES) {
        Py_DECREF(value);
        return false;
    }
    r->stack[r->height++] = value;
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

static bool
read_int(struct reader *r, size_t size, bool is_signed)
{
    const uint8_t *at = take(r, size);
    uint64_t number = 0;

    if (at == NULL)
        return false;
    for (size_t i = 0; i < size; i++)
        number |= (uint64_t)at[i] << 8 * i;
    if (is_signed && size < 8 && number >> (8 * size - 1))
        number |= UINT64_MAX << 8 * size;
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

static bool
read_short(struct reader *r, bool is_text)
{
    const uint8_t *size = take(r, 1);
    const uint8_t *at = size == NULL ? NULL : take(r, *size);

    if (at == NULL)
        return false;
    if (!is_text)
        return push(r, PyBytes_FromStringAndSize((const char *)at, *size));
    return push(r, PyUnicode_DecodeASCII((const char *)at, *size, NULL));
}

/* The height at the last MARK, which is open no more; -1 if there is none. */
static Py_ssize_t
close_mark(struct reader *r)
{
    return r->open > 0 ? r->marks[--r->open] : -1;
}

static bool
set_mark(struct reader *r)
{
    if (r->open == MOST_CONTAINERS)
        return false;
    r->marks[r->open++] = r->height;
    return true;
}

/* Have a tuple take the place of the values from `from` on. */
static bool
read_tuple(struct reader *r, Py_ssize_t from)
{
    Py_ssize_t least = r->open > 0 ? r->marks[r->open - 1] : 0;
    PyObject *tuple;

    if (from < least || (tuple = PyTuple_New(r->height - from)) == NULL)
        return false;
    for (Py_ssize_t i = from; i < r->height; i++)
        PyTuple_SET_ITEM(tuple, i - from, r->stack[i]);
    r->height = from;
    return push(r, tuple);
}

/* What is below the last mark, of a type; NULL if it is not.  A mark is never above the top. */
static PyObject *
below(const struct reader *r, Py_ssize_t mark, Py_ssize_t least, PyTypeObject *type)
{
    return mark > least && Py_IS_TYPE(r->stack[mark - 1], type) ? r->stack[mark - 1] : NULL;
}

/* Put what is above the last mark into the list or dict below it. */
static bool
read_items(struct reader *r, bool pairs)
{
    Py_ssize_t from = close_mark(r), least = r->open > 0 ? r->marks[r->open - 1] : 0;
    PyObject *into = below(r, from, least, pairs ? &PyDict_Type : &PyList_Type);

    if (into == NULL || (pairs && (r->height - from) % 2 != 0))
        return false;
    for (Py_ssize_t i = from; i < r->height; i += pairs ? 2 : 1)
        if ((pairs ? PyDict_SetItem(into, r->stack[i], r->stack[i + 1]) : PyList_Append(into, r->stack[i])) != 0)
            return false;
    while (r->height > from)
        Py_DECREF(r->stack[--r->height]);
    return true;
}

/* Do what one code says; false if it is none of ours. */
static bool
read_one(struct reader *r, uint8_t code)
{
    const uint8_t *size;

    switch (code) {
    case BININT1:
        return read_int(r, 1, false);
    case BININT2:
        return read_int(r, 2, false);
    case BININT:
        return read_int(r, 4, true);
    case LONG1:
        return (size = take(r, 1)) != NULL && *size == 8 && read_int(r, 8, true);
    case BINFLOAT:
        return read_float(r);
    case SHORT_BINUNICODE:
        return read_short(r, true);
    case SHORT_BINBYTES:
        return read_short(r, false);
    case NONE:
        return push(r, Py_NewRef(Py_None));
    case NEWTRUE:
        return push(r, Py_NewRef(Py_True));
    case NEWFALSE:
        return push(r, Py_NewRef(Py_False));
    case EMPTY_TUPLE:
        return push(r, PyTuple_New(0));
    case TUPLE1:
    case TUPLE2:
    case TUPLE3:
        return read_tuple(r, r->height - (code - TUPLE1 + 1));
    case MARK:
        return set_mark(r);
    case TUPLE:
        return read_tuple(r, close_mark(r));
    case EMPTY_DICT:
        return push(r, PyDict_New());
    case SETITEMS:
        return read_items(r, true);
    case EMPTY_LIST:
        return push(r, PyList_New(0));
    case APPENDS:
        return read_items(r, false);
    default:
        return false;
    }
}

static _Atomic unsigned long read_so_far; /* relaxed: it tells nothing but itself */

/* Read a whole pickle; NULL, without an exception, if it is none that is written here. */
static PyObject *
read_pickle(PyObject *data)
{
    struct reader r; /* not set to zeros: that would take as long as the reading */
    PyObject *result = NULL;
    bool ours;

    if (!PyBytes_CheckExact(data) || PyBytes_GET_SIZE(data) < 3 || PyBytes_GET_SIZE(data) > MOST_BYTES)
        return NULL;
    r.height = 0;
    r.open = 0;
    r.next = (const uint8_t *)PyBytes_AS_STRING(data);
    r.end = r.next + PyBytes_GET_SIZE(data) - 1; /* without STOP, which is looked at first */
    ours = *r.end == STOP && r.next[0] == PROTO && r.next[1] == PROTOCOL;
    r.next += 2;
    while (ours && r.next < r.end)
        ours = read_one(&r, *r.next++);
    if (ours && r.height == 1 && r.open == 0) {
        result = r.stack[--r.height];
        atomic_fetch_add_explicit(&read_so_far, 1, memory_order_relaxed);
    }
    while (r.height > 0)
        Py_DECREF(r.stack[--r.height]);
    PyErr_Clear(); /* what went wrong, pickle says better */
    return result;
}

/* Read what may be a batch of a stream; NULL likewise. */
static PyObject *
read_batch(PyObject *data)
{
    PyObject *list;

    if (!PyBytes_CheckExact(data) || PyBytes_GET_SIZE(data) < LONG_LIST)
        return NULL;
    list = doorpool_read_batch((const uint8_t *)PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data));
    if (list != NULL)
        atomic_fetch_add_explicit(&read_so_far, 1, memory_order_relaxed);
    return list;
}

/* -- what Python sees -------------------------------------------------------------------------- */

PyDoc_STRVAR(pack_call_doc,
"pack_call(args, kwargs)\n--\n\n"
"Pickle `(args, kwargs)`; None if that is not for these functions.");

static PyObject *
atoms_pack_call(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    struct writer w;

    if (count != 2 || !PyTuple_CheckExact(args[0]) || !PyDict_CheckExact(args[1])) {
        PyErr_SetString(PyExc_TypeError, "pack_call() takes a tuple and a dict");
        return NULL;
    }
    begin(&w);
    if (put_tuple(&w, args[0]) && put_dict(&w, args[1]) && put_code(&w, TUPLE2) && put_code(&w, STOP))
        return PyBytes_FromStringAndSize((const char *)w.bytes, (Py_ssize_t)w.size);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(unpack_call_doc,
"unpack_call(data)\n--\n\n"
"Return `(args, kwargs)`, a tuple and a dict; None if that is not what these functions pickle.");

static PyObject *
atoms_unpack_call(PyObject *Py_UNUSED(module), PyObject *data)
{
    PyObject *call = read_pickle(data);

    if (call != NULL && PyTuple_CheckExact(call) && PyTuple_GET_SIZE(call) == 2
        && PyTuple_CheckExact(PyTuple_GET_ITEM(call, 0)) && PyDict_CheckExact(PyTuple_GET_ITEM(call, 1)))
        return call;
    Py_XDECREF(call);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(pack_value_doc,
"pack_value(value)\n--\n\n"
"Pickle a value; None if that is not for these functions.");

static PyObject *
atoms_pack_value(PyObject *Py_UNUSED(module), PyObject *value)
{
    struct writer w;

    begin(&w);
    if (put_item(&w, value) && put_code(&w, STOP))
        return PyBytes_FromStringAndSize((const char *)w.bytes, (Py_ssize_t)w.size);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(unpack_value_doc,
"unpack_value(data)\n--\n\n"
"Return the value; NotImplemented if it is not what these functions pickle.");

static PyObject *
atoms_unpack_value(PyObject *Py_UNUSED(module), PyObject *data)
{
    PyObject *value = read_batch(data);

    if (value == NULL)
        value = read_pickle(data);
    return value != NULL ? value : Py_NewRef(Py_NotImplemented);
}

PyDoc_STRVAR(unpacked_doc,
"unpacked()\n--\n\n"
"Return how many pickles have been read here, in this process and before it was forked.");

static PyObject *
atoms_unpacked(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromUnsignedLong(atomic_load_explicit(&read_so_far, memory_order_relaxed));
}

PyMethodDef doorpool_atoms_methods[] = {
    {"pack_call", (PyCFunction)(void (*)(void))atoms_pack_call, METH_FASTCALL, pack_call_doc},
    {"unpack_call", atoms_unpack_call, METH_O, unpack_call_doc},
    {"pack_value", atoms_pack_value, METH_O, pack_value_doc},
    {"unpack_value", atoms_unpack_value, METH_O, unpack_value_doc},
    {"unpacked", atoms_unpacked, METH_NOARGS, unpacked_doc},
    {NULL, NULL, 0, NULL},
};
