// Memory that is given back is that of read-only file mappings, and what is read there afterwards is the file.

#include "memory.h"

#include "check.h"
#include "ggml-backend.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __linux__
#    include <fcntl.h>
#    include <sys/mman.h>
#    include <unistd.h>

// KB of a mapping that are in memory
static long resident(const void * begin) {
    FILE * maps = fopen("/proc/self/smaps", "r");
    char   line[512];
    long   res = -1;
    bool   in  = false;
    while (maps && fgets(line, sizeof(line), maps)) {
        unsigned long from = 0, to = 0;
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2) {
            in = from <= (unsigned long) begin && (unsigned long) begin < to;
        } else if (in && sscanf(line, "Rss: %ld", &res) == 1) {
            break;
        }
    }
    if (maps) {
        fclose(maps);
    }
    return res;
}

static void test_give_back() {
    static constexpr size_t size = 4 << 20;
    std::vector<char>       data(size);
    for (size_t i = 0; i < size; ++i) {
        data[i] = (char) (i * 31 + i / 4096);
    }
    char      path[] = "/tmp/entmtp-test-memory-XXXXXX";
    const int file   = mkstemp(path);
    CHECK(file >= 0 && write(file, data.data(), size) == (ssize_t) size);
    unlink(path);

    const auto mapped = [&](int prot, int flags) {
        char * p = (char *) mmap(nullptr, size, prot, flags, file, 0);
        CHECK(p != MAP_FAILED && memcmp(p, data.data(), size) == 0); // all of it is touched
        return p;
    };

    char * shared = mapped(PROT_READ, MAP_SHARED);
    CHECK(resident(shared) >= (long) (size >> 10));
    CHECK(entmtp::is_of_file(shared + 100, size - 200));
    entmtp::give_back(shared + 100, size - 200); // its first and last page hold other bytes too
    CHECK(resident(shared) <= 64);
    CHECK(memcmp(shared, data.data(), size) == 0);

    CHECK(!entmtp::is_of_file(shared + 100, 1000)); // too little to bother
    munmap(shared, size);

    // what was written over a file's pages is in memory alone
    char * written = mapped(PROT_READ | PROT_WRITE, MAP_PRIVATE);
    CHECK(!entmtp::is_of_file(written, size));
    munmap(written, size);

    CHECK(!entmtp::is_of_file(data.data(), size));
    close(file);
}

// a large buffer goes back when it is freed, and not to a heap in which smaller blocks would settle where it was
static void test_large_buffers() {
    free(malloc(31 << 20)); // from now on glibc keeps blocks of that size in its heap
    for (const size_t size : { 12 << 20, 2 << 20 }) {
        ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
        CHECK(buffer && ggml_backend_buffer_get_size(buffer) == size);
        void * base = ggml_backend_buffer_get_base(buffer);
        memset(base, 1, size);
        CHECK(resident(base) >= (long) (size >> 10));
        ggml_backend_buffer_free(buffer);
        CHECK_EQ(resident(base), -1); // nothing is mapped there
    }
}
#else
static void test_give_back() {}

static void test_large_buffers() {}
#endif

static void test_large_pages() {
    std::vector<char> some(3 << 20, 'x');
    entmtp::ask_large_pages(some.data(), some.size());
    entmtp::ask_large_pages(some.data(), 10);
    CHECK(some[0] == 'x' && some.back() == 'x');
}

int main() {
    test_give_back();
    test_large_buffers();
    test_large_pages();
    return check_result("test_memory");
}
