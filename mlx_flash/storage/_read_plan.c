/* Plans a batch of units as few long reads, on the caller's thread.

   The parts are sorted by file offset, neighbours merged into one read, large ones
   split. */

#include "_reads.h"

#include <stdlib.h>

/* As calls, planning takes half as long again (2,048 neurons: 66 µs, not 45). */
#define INLINED static inline __attribute__((always_inline))

Batch *new_batch(const Source *s, int64_t n)
{
    int64_t most = n * s->pieces_per_unit; /* pieces, and so jobs */
    double now = monotonic_s();
    Batch *b = malloc(sizeof *b + (size_t)n * sizeof(Pick) +
                      (size_t)most * (sizeof(Piece) + sizeof(Job)) +
                      (size_t)(n * s->n_parts) * sizeof(Piece));
    if (!b)
        return NULL;
    *b = (Batch){.source = s, .submitted = now, .ended = now};
    b->picks = (Pick *)(b + 1);
    b->pieces = (Piece *)(b->picks + n);
    b->jobs = (Job *)(b->pieces + most);
    b->places = (Piece *)(b->jobs + most);
    return b;
}

static int by_unit(const void *a, const void *b)
{
    int64_t x = ((const Pick *)a)->unit, y = ((const Pick *)b)->unit;
    return (x > y) - (x < y);
}

static int by_offset(const void *a, const void *b)
{
    int64_t x = ((const Piece *)a)->offset, y = ((const Piece *)b)->offset;
    return (x > y) - (x < y);
}

void sort_picks(Batch *b, int64_t n) { qsort(b->picks, (size_t)n, sizeof(Pick), by_unit); }

/* Adds a piece to the last job if one read may serve both, else opens a new job.
   `gap` is how many unwanted bytes, beyond alignment, are worth reading over. */
INLINED void add_piece(Batch *b, const Extent *e, Piece piece, int32_t index,
                       int64_t gap)
{
    int64_t start = floor_to(piece.offset, e->align);
    int64_t end = ceil_to(piece.offset + piece.bytes, e->align);
    int64_t ends = piece.offset | piece.bytes | (int64_t)(uintptr_t)piece.dst;
    b->pieces[index] = piece;
    if (b->n_jobs) {
        Job *job = &b->jobs[b->n_jobs - 1];
        const Piece *last = &b->pieces[index - 1];
        int64_t skipped = piece.offset - (last->offset + last->bytes);
        int32_t iovecs = job->iovecs + (skipped > 0 ? 2 : 1);
        /* skipped < 0: the same unit a second time, for another slot */
        if (job->extent == e && skipped >= 0 && start - job->end <= gap &&
            end - job->start <= MERGE_BYTES && iovecs <= MERGE_IOVECS) {
            b->bytes += end - job->end;
            job->end = end;
            job->count++;
            job->iovecs = iovecs;
            job->ends |= ends; /* and so of the gap before it */
            job->straight = floor_to(job->ends, e->scatter) == job->ends;
            return;
        }
    }
    int straight = floor_to(ends, e->align) == ends;
    b->jobs[b->n_jobs++] = (Job){e, start, end, index, 1, ends, 1, straight};
    b->bytes += end - start;
}

/* Adds a part of a unit; large ones are cut at a page of the file. Returns the index
   of the next piece. */
INLINED int32_t add_part(Batch *b, const Extent *e, Piece part, int32_t index,
                         int64_t gap)
{
    int64_t at = part.offset, stop = at + part.bytes;
    while (at < stop) {
        int64_t cut = floor_to(at + CHUNK_BYTES, PAGE);
        int64_t bytes = (stop - at > CHUNK_BYTES ? cut : stop) - at;
        add_piece(b, e, (Piece){at, bytes, part.dst}, index++, gap);
        at += bytes;
        part.dst += bytes;
    }
    return index;
}

static Piece part_of(const Part *p, int64_t at, int64_t slot)
{
    return (Piece){at, p->bytes, (uint8_t *)(intptr_t)p->rows + slot * p->bytes};
}

/* Units at a fixed stride, which are in file order already. */
static int32_t plan_stride(Batch *b, const Extent *e, const Part *parts, int64_t n,
                           int32_t index, int64_t max_gap)
{
    for (const Pick *pick = b->picks; pick < b->picks + n; pick++) {
        int64_t unit = e->offset + pick->unit * e->stride, gap = max_gap;
        for (const Part *p = parts; p < parts + e->n_parts; p++) {
            Piece part = part_of(p, unit + p->offset, pick->slot);
            index = add_part(b, e, part, index, gap);
            /* Padding inside a unit costs less than a second read. */
            gap = larger(max_gap, PAGE);
        }
    }
    return index;
}

/* Parts at places of their own: neighbours in the file need not be so as units. */
static int32_t plan_places(Batch *b, const Extent *e, const Part *parts, int64_t n,
                           int32_t index, int64_t max_gap)
{
    const int64_t *offsets = (const int64_t *)(intptr_t)e->offsets;
    int64_t count = 0;
    for (const Pick *pick = b->picks; pick < b->picks + n; pick++)
        for (int64_t p = 0; p < e->n_parts; p++) {
            int64_t at = offsets[pick->unit * e->n_parts + p];
            if (at >= 0) /* else it lies in another file */
                b->places[count++] = part_of(&parts[p], at, pick->slot);
        }
    qsort(b->places, (size_t)count, sizeof(Piece), by_offset);
    for (int64_t i = 0; i < count; i++)
        index = add_part(b, e, b->places[i], index, max_gap);
    return index;
}

void plan_reads(Batch *b, int64_t n, int64_t max_gap)
{
    int32_t index = 0;
    const Part *parts = b->source->parts;
    const Extent *e = b->source->extents, *end = e + b->source->n_extents;
    for (; e < end; parts += e++->n_parts)
        index = (e->offsets ? plan_places : plan_stride)(b, e, parts, n, index, max_gap);
}
