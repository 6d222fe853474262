#include "peaks.h"

#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace entmtp {

// f(thread) in n threads at once: seconds until the last is done, the best of 5
template <class F>
static double best_seconds(int n_threads, F && f) {
    double best = 1e30;
    for (int run = 0; run < 5; ++run) {
        std::atomic<int>         ready = { 0 };
        std::vector<std::thread> threads;
        std::vector<double>      seconds(n_threads);

        const auto join = [&] {
            for (std::thread & t : threads) {
                t.join();
            }
        };
        try {
            for (int i = 0; i < n_threads; ++i) {
                threads.emplace_back([&, i] {
                    ++ready;
                    while (ready < n_threads) {
                    }
                    const auto t0 = std::chrono::steady_clock::now();
                    f(i);
                    seconds[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
                });
            }
        } catch (...) { // the system gives no more threads
            ready = n_threads;
            join();
            throw;
        }
        join();
        best = std::min(best, *std::max_element(seconds.begin(), seconds.end()));
    }
    return best;
}

void machine_peaks(int n_threads, double * bytes_per_s, double * macs_per_s) {
    // larger than any cache; each thread reads its part
    std::vector<uint64_t> memory((size_t) 512 << 17, 1); // 512 MiB
    std::atomic<uint64_t> sink = { 0 };

    const size_t part = memory.size() / n_threads / 32 * 32;
    const double read = best_seconds(n_threads, [&](int i) {
        const uint64_t * p     = memory.data() + i * part;
        uint64_t         s[32] = {};
        for (size_t k = 0; k < part; k += 32) {
            for (int j = 0; j < 32; ++j) {
                s[j] += p[k + j];
            }
        }
        for (uint64_t x : s) {
            sink += x;
        }
    });
    *bytes_per_s      = (double) part * n_threads * sizeof(uint64_t) / read;

    const kernel_set * set = kernel_sets()[0];
    *macs_per_s            = 0.0;
    if (set->int8_peak) {
        std::atomic<int64_t> macs = { 0 };
        const double         s    = best_seconds(n_threads, [&](int) { macs = set->int8_peak(1000000); });
        *macs_per_s               = (double) macs * n_threads / s;
    }
}

} // namespace entmtp
