/*
 * Keys that strangers have chosen: whether a dict or a set of them would take more than its time.
 *
 * Python's hashes of texts and bytes are keyed, and nobody can choose texts that collide.  All others can be
 * worked out: those of the 2**n tuples of -1 and -2 are equal, UUIDs that differ by 2**61 - 1 have one hash, and
 * numbers of 32 bits can be chosen that stand in one another's way, each with a hash of its own: the places that
 * a dict looks at are one sequence, wherever it begins (see `step`).  A dict of n such keys takes n * n / 2
 * steps, with the interpreter's lock held: 400 kB, two seconds.
 *
 * So before msgspec makes containers of a message, `keys_of` finds the large ones in its bytes, and writes their
 * keys (or items, which may be meant for a set) out; `_keys.py` has msgspec read these, and `steps_of` does with
 * their hashes what a dict or a set will do, and counts.  Both take time in proportion to the bytes.  What is not
 * large needs no looking at: a map of up to 15 keys, all of which collide, takes no longer than its bytes explain.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define LARGE 16            /* keys from which a container is looked at */
#define CHUNK 64            /* keys that are written, and read, together */
#define MOST_DEPTH (1 << 14) /* msgspec stops where the interpreter does, sooner */
#define MOST_COPIES 8       /* of each byte: how often a key in a large container may hold large ones itself */
#define STEPS_COMPARED 8    /* what comparing two keys of one hash counts, besides their bytes */

/* -- finding them ------------------------------------------------------------------------------ */

enum kind { NOTHING, PLAIN, OPEN, ARRAY, MAP }; /* OPEN: its hash is not keyed, or it is unknown */

struct head {
    enum kind kind;
    uint64_t size;  /* of the bytes before the parts, or of all */
    uint64_t parts; /* of an array or a map: a key and its value are two */
};

/* From 0xc0 on: what it is, the bytes that always come, and how many of these (after the first) say how many more. */
static const struct {
    uint8_t kind, size, count;
} HEADS[32] = {
    {PLAIN, 1, 0}, {NOTHING, 0, 0}, {PLAIN, 1, 0}, {PLAIN, 1, 0},              /* nil, none, false, true */
    {PLAIN, 2, 1}, {PLAIN, 3, 2}, {PLAIN, 5, 4},                              /* bin */
    {OPEN, 3, 1}, {OPEN, 4, 2}, {OPEN, 6, 4},                                 /* ext */
    {OPEN, 5, 0}, {OPEN, 9, 0},                                               /* float */
    {OPEN, 2, 0}, {OPEN, 3, 0}, {OPEN, 5, 0}, {OPEN, 9, 0},                   /* uint */
    {OPEN, 2, 0}, {OPEN, 3, 0}, {OPEN, 5, 0}, {OPEN, 9, 0},                   /* int */
    {OPEN, 3, 0}, {OPEN, 4, 0}, {OPEN, 6, 0}, {OPEN, 10, 0}, {OPEN, 18, 0},   /* fixext */
    {PLAIN, 2, 1}, {PLAIN, 3, 2}, {PLAIN, 5, 4},                              /* str */
    {ARRAY, 3, 2}, {ARRAY, 5, 4}, {MAP, 3, 2}, {MAP, 5, 4},
};

/* Read the head of a value; NOTHING if there is none, or it ends too soon. */
static struct head
head_of(const uint8_t *at, size_t room)
{
    uint8_t first = room > 0 ? *at : 0xc1;
    struct head head = {OPEN, 1, 0};
    uint64_t count = 0;

    if (first >= 0x80 && first < 0x90)
        return (struct head){MAP, 1, 2 * (first & 0x0f)};
    if (first >= 0x90 && first < 0xa0)
        return (struct head){ARRAY, 1, first & 0x0f};
    if (first >= 0xa0 && first < 0xc0)
        head = (struct head){PLAIN, 1 + (first & 0x1f), 0};
    if (first >= 0xc0 && first < 0xe0) {
        head.kind = HEADS[first - 0xc0].kind;
        head.size = HEADS[first - 0xc0].size;
        if (head.size > room)
            return (struct head){NOTHING, 0, 0};
        for (unsigned i = 1; i <= HEADS[first - 0xc0].count; i++)
            count = count << 8 | at[i];
        if (head.kind == ARRAY || head.kind == MAP)
            head.parts = head.kind == MAP ? 2 * count : count;
        else
            head.size += count;
    }
    if (head.size > room)
        head.kind = NOTHING;
    return head;
}

/* A container that is being read. */
struct frame {
    uint64_t left;      /* parts that are still to come */
    bool map, large;
    const uint8_t *key; /* where the part began that is being read, if it is a key of a large one; else NULL */
    PyObject *chunks;   /* what was written of a large one, and what is being written, or NULL */
    uint8_t *bytes;
    size_t size, room;
    unsigned keys;
};

struct reader {
    const uint8_t *at, *end;
    bool arrays, texts, write;
    bool found;     /* something for which it is worth writing */
    size_t copies;  /* bytes of containers that may still be written */
    PyObject *list; /* of what is given back */
    struct frame *frames;
    size_t depth, room;
};

/* Begin a chunk: an array, its length, and in it a map of one for each key, which is how msgspec makes a key of
   it: of an array, a tuple. */
static bool
flush(struct frame *f)
{
    PyObject *chunk;
    int failed;

    if (f->keys == 0)
        return true;
    f->bytes[0] = 0xdc;
    f->bytes[1] = 0;
    f->bytes[2] = (uint8_t)f->keys;
    chunk = PyBytes_FromStringAndSize((const char *)f->bytes, (Py_ssize_t)f->size);
    if (chunk == NULL)
        return false;
    failed = PyList_Append(f->chunks, chunk);
    Py_DECREF(chunk);
    f->keys = 0;
    f->size = 3;
    return failed == 0;
}

static bool
write_key(struct frame *f, const uint8_t *key, size_t size)
{
    if (f->room < f->size + size + 6) {
        size_t room = 2 * (f->size + size + 6);
        uint8_t *bytes = PyMem_Realloc(f->bytes, room);
        if (bytes == NULL) {
            PyErr_NoMemory();
            return false;
        }
        f->bytes = bytes;
        f->room = room;
    }
    f->bytes[f->size++] = 0x81;
    memcpy(f->bytes + f->size, key, size);
    f->size += size;
    f->bytes[f->size++] = 0xce;
    for (int shift = 24; shift >= 0; shift -= 8)
        f->bytes[f->size++] = (uint8_t)(size >> shift);
    return ++f->keys < CHUNK || flush(f);
}

/* Enter a container. */
static bool
push(struct reader *r, struct head head)
{
    struct frame *f;

    if (r->depth >= MOST_DEPTH) {
        PyErr_SetString(PyExc_RecursionError, "it is nested too deeply");
        return false;
    }
    if (r->depth == r->room) {
        size_t room = 2 * r->room + 16;
        struct frame *frames = PyMem_Realloc(r->frames, room * sizeof *frames);
        if (frames == NULL) {
            PyErr_NoMemory();
            return false;
        }
        r->frames = frames;
        r->room = room;
    }
    f = &r->frames[r->depth++];
    *f = (struct frame){.left = head.parts, .map = head.kind == MAP, .size = 3};
    f->large = f->map ? head.parts >= 2 * LARGE : r->arrays && head.parts >= LARGE;
    if (f->large && (!f->map || r->texts))
        r->found = true;
    if (f->large && r->write && (f->chunks = PyList_New(0)) == NULL)
        return false;
    return true;
}

/* Leave a container, and give back what was written of it. */
static bool
pop(struct reader *r)
{
    struct frame *f = &r->frames[--r->depth];
    bool fine = true;

    if (f->chunks != NULL && !PyErr_Occurred()) {
        PyObject *pair = flush(f) ? Py_BuildValue("OO", f->map ? Py_True : Py_False, f->chunks) : NULL;
        fine = pair != NULL && PyList_Append(r->list, pair) == 0;
        Py_XDECREF(pair);
    }
    Py_XDECREF(f->chunks);
    PyMem_Free(f->bytes);
    return fine;
}

/* A part of the innermost container is over. */
static bool
end_part(struct reader *r, bool container)
{
    struct frame *f;
    size_t size;

    if (r->depth == 0)
        return true;
    f = &r->frames[r->depth - 1];
    if (f->key == NULL || f->chunks == NULL)
        return true;
    size = (size_t)(r->at - f->key);
    if (container) {
        if (size > r->copies) {
            PyErr_SetString(PyExc_ValueError, "long lists are nested too deeply in it");
            return false;
        }
        r->copies -= size;
    }
    return write_key(f, f->key, size);
}

/* Read the next value, or the head of it; false at the end of what is to be read, and with an exception. */
static bool
read_one(struct reader *r)
{
    struct frame *f = r->depth ? &r->frames[r->depth - 1] : NULL;
    struct head head;

    if (f != NULL && f->left == 0)
        return pop(r) && end_part(r, true) && r->depth > 0;
    head = head_of(r->at, (size_t)(r->end - r->at));
    if (head.kind == NOTHING)
        return false;
    if (f != NULL) {
        f->key = f->large && (!f->map || f->left % 2 == 0) ? r->at : NULL;
        f->left--;
        if (f->key != NULL && f->map && head.kind != PLAIN)
            r->found = true;
    }
    r->at += head.size;
    if (head.kind == ARRAY || head.kind == MAP)
        return push(r, head);
    return end_part(r, false) && f != NULL;
}

/* Go through a message, of which only the beginning may be one: as much of it would be made. */
static bool
go_through(struct reader *r)
{
    while (read_one(r) && (r->write || !r->found))
        ;
    while (r->depth > 0)
        pop(r);
    return !PyErr_Occurred();
}

PyDoc_STRVAR(keys_of_doc,
"keys_of(data, arrays, texts)\n--\n\n"
"Find the large containers in a message: a list of `(is_map, chunks)`.\n\n"
"Each chunk is a message itself: a list of maps of one key each, of the container's, and its size in bytes.  For\n"
"an array, if `arrays` is set, these are its items.  If there is none that need be looked at, the list is empty: maps whose\n"
"keys are all texts or bytes (unless `texts` is set, for they may become something else).\n\n"
"Raises:\n"
"    ValueError: long lists are nested too deeply in it.\n"
"    RecursionError: it is nested too deeply.");

static PyObject *
keys_keys_of(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer data;
    int arrays, texts;
    struct reader r = {0};

    if (!PyArg_ParseTuple(args, "y*pp:keys_of", &data, &arrays, &texts))
        return NULL;
    r.list = PyList_New(0);
    r.arrays = arrays;
    r.texts = texts;
    r.copies = MOST_COPIES * (size_t)data.len;
    r.end = (const uint8_t *)data.buf + data.len;
    for (int pass = 0; r.list != NULL && pass < 2 && (pass == 0 || r.found); pass++) {
        r.at = data.buf;
        r.write = pass == 1;
        if (!go_through(&r))
            Py_CLEAR(r.list);
    }
    PyMem_Free(r.frames);
    PyBuffer_Release(&data);
    return r.list;
}

/* -- counting ---------------------------------------------------------------------------------- */

struct entry {
    size_t hash;
    PyObject *key; /* whoever calls holds it */
    int64_t size;  /* that it was written in, which is no less than what is compared of it */
};

struct place {
    int32_t entry; /* or -1: free */
    uint32_t tag;  /* half of its hash, that few need be fetched which are not sought */
};

/* A dict or a set, of which only the places count. */
struct table {
    bool dict;
    struct entry *entries;
    struct place *places;
    size_t used, mask;
    int64_t steps; /* that are left */
};

enum found { ABSENT, PRESENT, FAILED };

/* Compare a key with the one at a place. */
static enum found
compare(struct table *t, const struct entry *sought, struct place place)
{
    struct entry *there = &t->entries[place.entry];
    int equal;

    if (place.tag != (uint32_t)sought->hash || there->hash != sought->hash)
        return ABSENT;
    t->steps -= STEPS_COMPARED + (there->size < sought->size ? there->size : sought->size);
    if (there->key == sought->key)
        return PRESENT;
    equal = PyObject_RichCompareBool(there->key, sought->key, Py_EQ);
    return equal < 0 ? FAILED : equal ? PRESENT : ABSENT;
}

/* Where to look next, and what is left of the hash to say so: when that is nought, all go one way round. */
static size_t
step(const struct table *t, size_t i, size_t *rest)
{
    *rest >>= 5;
    return (i * 5 + *rest + 1) & t->mask;
}

/* Look for a key, or (if that is NULL, as its like is not there) for a free place alone; see `Objects/dictobject.c`
   and `Objects/setobject.c`. */
static enum found
seek(struct table *t, const struct entry *sought, bool only_free, size_t *free)
{
    size_t rest = sought->hash, i = rest & t->mask;

    for (; t->steps > 0; i = step(t, i, &rest)) {
        size_t more = !t->dict && i + 9 <= t->mask ? 9 : 0;
        t->steps--; /* neighbours cost little */
        for (*free = i; *free <= i + more; ++*free) {
            struct place place = t->places[*free];
            enum found found;
            if (place.entry < 0)
                return ABSENT;
            found = only_free ? ABSENT : compare(t, sought, place);
            if (found != ABSENT)
                return found;
        }
    }
    return FAILED;
}

static bool
resize(struct table *t, size_t wanted)
{
    size_t size = 8, free;
    struct place *places;

    while (t->dict ? size < wanted : size <= wanted)
        size *= 2;
    places = PyMem_Realloc(t->places, size * sizeof *places);
    if (places == NULL) {
        PyErr_NoMemory();
        return false;
    }
    t->places = places;
    t->mask = size - 1;
    memset(places, -1, size * sizeof *places);
    for (size_t n = 0; n < t->used; n++) {
        if (seek(t, &t->entries[n], true, &free) != ABSENT)
            return false;
        places[free] = (struct place){(int32_t)n, (uint32_t)t->entries[n].hash};
    }
    return true;
}

/* Add a key; false with an exception, or if no steps are left. */
static bool
add(struct table *t, PyObject *key, Py_hash_t hash, int64_t size)
{
    struct entry *entry = &t->entries[t->used];
    size_t free;
    enum found found;

    *entry = (struct entry){(size_t)hash, key, size};
    found = seek(t, entry, false, &free);
    if (found != ABSENT)
        return found == PRESENT;
    if (t->dict && t->used >= (t->mask + 1) * 2 / 3) {
        if (!resize(t, 3 * t->used) || seek(t, entry, true, &free) != ABSENT)
            return false;
    }
    t->places[free] = (struct place){(int32_t)t->used++, (uint32_t)hash};
    if (!t->dict && t->used * 5 >= t->mask * 3)
        return resize(t, t->used * (t->used > 50000 ? 2 : 4));
    return true;
}

PyDoc_STRVAR(steps_of_doc,
"steps_of(keys, sizes, is_map, most)\n--\n\n"
"Count the steps that a dict (else a set) of these keys would take, to be made; more than `most` if these do not do.\n"
"`sizes` has the bytes of each.\n\n"
"It looks no further than to one that cannot be hashed or compared: no container is made of that.");

static PyObject *
keys_steps_of(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *keys, *sizes;
    int dict;
    struct table t = {0};
    bool fine;
    Py_ssize_t count;
    long long most;

    if (!PyArg_ParseTuple(args, "O!O!pL:steps_of", &PyTuple_Type, &keys, &PyTuple_Type, &sizes, &dict, &most))
        return NULL;
    count = PyTuple_GET_SIZE(keys);
    if (PyTuple_GET_SIZE(sizes) != count)
        return PyErr_Format(PyExc_ValueError, "%zd keys, and %zd sizes", count, PyTuple_GET_SIZE(sizes));
    if (count > INT32_MAX)
        return PyErr_Format(PyExc_OverflowError, "more than %d keys", INT32_MAX);
    t.dict = dict;
    t.steps = most + 1;
    t.entries = PyMem_New(struct entry, (size_t)count + 1);
    fine = t.entries != NULL && resize(&t, 0);
    if (t.entries == NULL)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; fine && i < count; i++) {
        PyObject *key = PyTuple_GET_ITEM(keys, i);
        unsigned long size = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(sizes, i)) & UINT32_MAX;
        Py_hash_t hash = PyErr_Occurred() ? -1 : PyObject_Hash(key);
        fine = (hash != -1 || !PyErr_Occurred()) && add(&t, key, hash, (int64_t)size);
    }
    PyMem_Free(t.entries);
    PyMem_Free(t.places);
    if (PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_MemoryError) || !PyErr_ExceptionMatches(PyExc_Exception))
            return NULL;
        PyErr_Clear();
    }
    return PyLong_FromLongLong(most + 1 - t.steps);
}

PyMethodDef doorpool_keys_methods[] = {
    {"keys_of", keys_keys_of, METH_VARARGS, keys_of_doc},
    {"steps_of", keys_steps_of, METH_VARARGS, steps_of_doc},
    {NULL, NULL, 0, NULL},
};
