// What the system is asked of the memory that weights come from and go to.

#pragma once

#include <cstddef>

namespace entmtp {

// Large pages, before the memory is touched: with 4 KB pages, finding a page costs up to a sixth of a pass, more or less
// as the pages happen to lie.
void ask_large_pages(void * begin, size_t size);

// The process needs these bytes no more for now: where they are mapped from a file, what they take is given back. (They
// are read again from the file when they are touched.) Other memory stays as it is.
void give_back_file(const void * begin, size_t size);

} // namespace entmtp
