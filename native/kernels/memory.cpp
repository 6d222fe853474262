#include "memory.h"

#include <cstdint>

#ifdef _WIN32
#    include <windows.h>
#else
#    include <sys/mman.h>
#endif

#ifdef __linux__
#    include <unistd.h>

#    include <cinttypes>
#    include <cstdio>
#endif

namespace entmtp {

#ifdef __linux__

static constexpr size_t LARGE_PAGE  = 2 << 20;
static constexpr size_t MOST_COPIED = 1 << 30; // a pass may wait for that, some tenths of a second

// the whole pages between two addresses
static bool whole_pages(uintptr_t begin, uintptr_t end, void ** first, size_t * size) {
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    begin                = (begin + page - 1) / page * page;
    end                  = end / page * page;
    *first               = (void *) begin;
    *size                = begin < end ? end - begin : 0;
    return *size > 0;
}

void ask_large_pages(void * begin, size_t size) {
    const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t first = (uintptr_t) begin / page * page;                  // asking for neighbours too does no harm
    madvise((void *) first, (uintptr_t) begin + size - first, MADV_HUGEPAGE); // a system without them says so
}

void make_large_pages(void * begin, size_t size) {
#    ifdef MADV_COLLAPSE
    static constexpr int collapse = MADV_COLLAPSE;
#    else
    static constexpr int collapse = 25; // Linux 6.1
#    endif
    ask_large_pages(begin, size);
    void * first;
    if (size >= LARGE_PAGE && size <= MOST_COPIED &&
        whole_pages((uintptr_t) begin, (uintptr_t) begin + size, &first, &size)) {
        madvise(first, size, collapse);
    }
}

bool is_of_file(const void * first, size_t size) {
    static constexpr size_t least = 16 << 10; // less is not worth looking the mapping up
    const uintptr_t         begin = (uintptr_t) first, end = begin + size;

    FILE * maps = size >= least ? fopen("/proc/self/maps", "r") : nullptr;
    if (!maps) {
        return false;
    }
    bool res = false;
    char line[512];
    bool at_start = true; // long paths come in several pieces
    while (fgets(line, sizeof(line), maps)) {
        uintptr_t from = 0, to = 0;
        char      rights[5] = "";
        uint64_t  inode     = 0;
        if (at_start &&
            sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %*x %*x:%*x %" SCNu64, &from, &to, rights, &inode) == 4 &&
            from <= begin && begin < to) {
            res = end <= to && inode != 0 && rights[0] == 'r' && rights[1] == '-';
            break;
        }
        at_start = false;
        for (const char * c = line; *c; ++c) {
            at_start = *c == '\n';
        }
    }
    fclose(maps);
    return res;
}

void give_back(const void * begin, size_t size) {
    void * first;
    if (whole_pages((uintptr_t) begin, (uintptr_t) begin + size, &first, &size)) {
        madvise(first, size, MADV_DONTNEED);
        // what is touched beside it, vectors and rows of embeddings, shall not bring it back in large pages of the file
        madvise(first, size, MADV_NOHUGEPAGE);
    }
}

#else

void ask_large_pages(void *, size_t) {}

void make_large_pages(void *, size_t) {}

bool is_of_file(const void *, size_t) {
    return false;
}

void give_back(const void *, size_t) {}

#endif

bool lock_memory(const void * begin, size_t size) {
#ifdef _WIN32
    return VirtualLock((void *) begin, size);
#elif defined(MLOCK_ONFAULT)
    return mlock2(begin, size, MLOCK_ONFAULT) == 0;
#else
    return mlock(begin, size) == 0;
#endif
}

} // namespace entmtp
