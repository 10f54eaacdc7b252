/*
 * Pickling what most calls consist of: None, booleans, numbers, short ASCII strings and bytes.
 *
 * `pickle.dumps` makes a pickler, with a memo and a frame, and throws it away; `loads` likewise.  For two
 * numbers that takes 0.2 us each, and a call does it four times.  What is written here is an ordinary
 * pickle of protocol 5, which any unpickler reads; what is read here is only what is written here, and
 * all else is left to pickle.  So neither side need know whether the other has this.
 *
 *     80 05 <value> 2e                        a value
 *     80 05 28 <value>... 74 7d 86 2e         (args, {}); 29, 85, 86, 87 for up to three, as pickle does it
 *     80 05 28 <value>... 74 7d 28 <name> <value>... 75 86 2e    (args, kwargs)
 *
 * Nothing here ever runs anybody's code or imports anything: neither methods of a value, which are of
 * exactly these types, nor what a pickle names, for there is no code for names.  One thing is not kept: that
 * two of the values were the same object; they are immutable.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define MOST_BYTES 1024 /* of a pickle: in longer ones the copying counts, and not what is saved here */
#define MOST_VALUES 64  /* of a call */
#define SHORT 255       /* bytes of a string whose length is one byte */

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
};

/* -- writing ----------------------------------------------------------------------------------- */

struct writer {
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

static bool
put_args(struct writer *w, PyObject *args)
{
    static const uint8_t codes[] = {EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3};
    Py_ssize_t count = PyTuple_GET_SIZE(args);
    bool few = count <= 3;

    if (count > MOST_VALUES / 2 || (!few && !put_code(w, MARK)))
        return false;
    for (Py_ssize_t i = 0; i < count; i++)
        if (!put_value(w, PyTuple_GET_ITEM(args, i)))
            return false;
    return put_code(w, few ? codes[count] : TUPLE);
}

static bool
put_kwargs(struct writer *w, PyObject *kwargs)
{
    PyObject *name, *value;
    Py_ssize_t at = 0, count = PyDict_GET_SIZE(kwargs);

    if (!put_code(w, EMPTY_DICT))
        return false;
    if (count == 0)
        return true;
    if (count > MOST_VALUES / 8 || !put_code(w, MARK))
        return false;
    while (PyDict_Next(kwargs, &at, &name, &value))
        if (!PyUnicode_CheckExact(name) || !put_value(w, name) || !put_value(w, value))
            return false;
    return put_code(w, SETITEMS);
}

/* -- reading ----------------------------------------------------------------------------------- */

/* What was read, on a stack as an unpickler has it. */
struct reader {
    const uint8_t *next, *end;
    PyObject *stack[MOST_VALUES];
    Py_ssize_t height;
    Py_ssize_t mark; /* the height at the last MARK; -1: none */
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

/* Have a tuple take the place of the values from `from` on. */
static bool
read_tuple(struct reader *r, Py_ssize_t from)
{
    PyObject *tuple;

    if (from < 0 || from > r->height || (tuple = PyTuple_New(r->height - from)) == NULL)
        return false;
    for (Py_ssize_t i = from; i < r->height; i++)
        PyTuple_SET_ITEM(tuple, i - from, r->stack[i]);
    r->height = from;
    r->mark = -1;
    return push(r, tuple);
}

/* Put the pairs above the mark into the dict that is below it. */
static bool
read_items(struct reader *r)
{
    Py_ssize_t from = r->mark;
    PyObject *dict = from > 0 && from <= r->height ? r->stack[from - 1] : NULL;

    if (dict == NULL || !PyDict_CheckExact(dict) || (r->height - from) % 2 != 0)
        return false;
    for (Py_ssize_t i = from; i < r->height; i += 2)
        if (!PyUnicode_CheckExact(r->stack[i]) || PyDict_SetItem(dict, r->stack[i], r->stack[i + 1]) != 0)
            return false;
    while (r->height > from)
        Py_DECREF(r->stack[--r->height]);
    r->mark = -1;
    return true;
}

static bool
set_mark(struct reader *r)
{
    bool first = r->mark < 0;
    r->mark = r->height;
    return first;
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
        return r->mark < 0 && read_tuple(r, r->height - (code - TUPLE1 + 1));
    case MARK:
        return set_mark(r);
    case TUPLE:
        return read_tuple(r, r->mark);
    case EMPTY_DICT:
        return push(r, PyDict_New());
    case SETITEMS:
        return read_items(r);
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
    r.mark = -1;
    r.next = (const uint8_t *)PyBytes_AS_STRING(data);
    r.end = r.next + PyBytes_GET_SIZE(data) - 1; /* without STOP, which is looked at first */
    ours = *r.end == STOP && r.next[0] == PROTO && r.next[1] == PROTOCOL;
    r.next += 2;
    while (ours && r.next < r.end)
        ours = read_one(&r, *r.next++);
    if (ours && r.height == 1 && r.mark < 0) {
        result = r.stack[--r.height];
        atomic_fetch_add_explicit(&read_so_far, 1, memory_order_relaxed);
    }
    while (r.height > 0)
        Py_DECREF(r.stack[--r.height]);
    PyErr_Clear(); /* what went wrong, pickle says better */
    return result;
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
    w.bytes[0] = PROTO;
    w.bytes[1] = PROTOCOL;
    w.size = 2;
    if (put_args(&w, args[0]) && put_kwargs(&w, args[1]) && put_code(&w, TUPLE2) && put_code(&w, STOP))
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

    w.bytes[0] = PROTO;
    w.bytes[1] = PROTOCOL;
    w.size = 2;
    if (put_value(&w, value) && put_code(&w, STOP))
        return PyBytes_FromStringAndSize((const char *)w.bytes, (Py_ssize_t)w.size);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(unpack_value_doc,
"unpack_value(data)\n--\n\n"
"Return the value; NotImplemented if it is not what these functions pickle.");

static PyObject *
atoms_unpack_value(PyObject *Py_UNUSED(module), PyObject *data)
{
    PyObject *value = read_pickle(data);
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
