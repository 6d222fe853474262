// What the fuzzers share: bytes that become decisions, and promises that must hold.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

// Of libFuzzer; replay.cpp has one that changes nothing
extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

// a promise was broken: libFuzzer keeps the input
#define MUST(cond)                                                                   \
    do {                                                                             \
        if (!(cond)) {                                                               \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #cond); \
            abort();                                                                 \
        }                                                                            \
    } while (0)

// decisions, taken from the input byte by byte; zeros when it has ended
class decisions {
  public:
    decisions(const uint8_t * data, size_t size) : at(data), end(data + size) {}

    bool over() const { return at == end; }

    uint8_t byte() { return over() ? 0 : *at++; }

    // low .. high
    int32_t between(int32_t low, int32_t high) { return low + byte() % (high - low + 1); }

    bool flag() { return byte() & 1; }

    // once in a while
    bool rarely() { return byte() % 16 == 15; }

  private:
    const uint8_t * at;
    const uint8_t * end;
};
