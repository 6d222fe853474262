// What the system is asked of the memory that weights come from and go to.

#pragma once

#include <cstddef>

namespace entmtp {

// Large pages, before the memory is touched: with 4 KB pages, finding a page costs up to a sixth of a pass, more or less
// as the pages happen to lie.
void ask_large_pages(void * begin, size_t size);

// The same for memory that may have been touched: what was is copied into large pages. (Linux 6.1 and later, up to 1 GB;
// otherwise the system does it when it comes by.)
void make_large_pages(void * begin, size_t size);

// These bytes are mapped from a file, read-only, and are enough of them to be worth giving back.
bool is_of_file(const void * begin, size_t size);

// The process needs these bytes of a file no more for now: what they take is given back. (They are read again from the file
// when they are touched.)
void give_back(const void * begin, size_t size);

// Keep these bytes in memory, whatever others ask for, from when they are first touched or from now on. false: the system does
// not allow it
bool lock_memory(const void * begin, size_t size);

} // namespace entmtp
