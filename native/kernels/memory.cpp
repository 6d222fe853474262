#include "memory.h"

#include <cstdint>

#ifdef __linux__
#    include <sys/mman.h>
#    include <unistd.h>

#    include <cinttypes>
#    include <cstdio>
#endif

namespace entmtp {

#ifdef __linux__

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
    void * first;
    if (whole_pages((uintptr_t) begin, (uintptr_t) begin + size, &first, &size)) {
        madvise(first, size, MADV_HUGEPAGE); // a system without them says so, and that is all
    }
}

// begin to end lie in one mapping, read-only, of a file
static bool is_of_file(uintptr_t begin, uintptr_t end) {
    FILE * maps = fopen("/proc/self/maps", "r");
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

void give_back_file(const void * begin, size_t size) {
    static constexpr size_t least = 256 << 10; // less is not worth looking the mapping up
    void *                  first;
    if (size >= least && is_of_file((uintptr_t) begin, (uintptr_t) begin + size) &&
        whole_pages((uintptr_t) begin, (uintptr_t) begin + size, &first, &size)) {
        madvise(first, size, MADV_DONTNEED);
    }
}

#else

void ask_large_pages(void *, size_t) {}

void give_back_file(const void *, size_t) {}

#endif

} // namespace entmtp
