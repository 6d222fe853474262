// The CPU kernels' attention: every instruction set against the portable one, bit for bit, and against sums in double.

#include "check.h"
#include "half.h"
#include "kernel_sets.h"
#include "kernels.h"
#include "sight.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

using namespace entmtp;

// probabilities down to the smallest, rows of every length
static void test_softmax() {
    for (int n : { 1, 3, 4, 15, 16, 17, 33, 1000, 1500 }) {
        std::vector<float>    x(n), want(n), got(n);
        std::vector<uint16_t> mask(n);
        for (int i = 0; i < n; ++i) {
            x[i]    = -0.1f * (float) (i * 7 % 1013);
            mask[i] = i % 5 == 4 ? 0xfc00 : 0;
        }
        const float sink = -1.0f;
        for (const uint16_t * m : { (const uint16_t *) nullptr, (const uint16_t *) mask.data() }) {
            for (int i = 4; m && i < n; i += 5) { // scores that are not seen may be anything
                x[i] = i % 3 == 0 ? INFINITY : i % 3 == 1 ? -INFINITY : NAN;
            }
            portable().softmax(x.data(), m, nullptr, want.data(), n, 1.0f, 1.0f, m ? &sink : nullptr);
            double sum = m ? std::exp(-1.0) : 0.0;
            for (int i = 0; i < n; ++i) {
                sum += m && m[i] ? 0.0 : std::exp((double) x[i]);
            }
            for (int i = 0; i < n; ++i) {
                const double exact = m && m[i] ? 0.0 : std::exp((double) x[i]) / sum;
                CHECK_NEAR(want[i], exact, 1e-6 * exact + 1e-37);
            }
            for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
                (*set)->softmax(x.data(), m, nullptr, got.data(), n, 1.0f, 1.0f, m ? &sink : nullptr);
                CHECK(same_bits(got, want));
            }
        }
    }
}

struct attention_case {
    int  n_query, n_dim, n_kv;
    bool f32, masked;

    std::vector<int32_t>  order; // empty: as they lie
    std::vector<float>    k, v, q;
    std::vector<uint8_t>  k_data, v_data;
    std::vector<uint16_t> mask; // [n_query][n_kv]
};

static std::vector<float> attend(const kernel_set & set, attention_case & c) {
    std::vector<float> out(c.n_query * c.n_dim), scratch(attention_scratch(c.n_kv, c.n_dim, c.n_dim));
    attention          a = {};
    a.n_query            = c.n_query;
    a.n_kv               = c.n_kv;
    a.n_dim_k = a.n_dim_v = c.n_dim;
    a.k_type = a.v_type = c.f32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
    a.k_stride = a.v_stride = c.n_dim * (c.f32 ? 4 : 2);
    a.k                     = c.k_data.data();
    a.v                     = c.v_data.data();
    a.scale                 = 1.0f / std::sqrt((float) c.n_dim);
    a.scratch               = scratch.data();
    a.order                 = c.order.empty() ? nullptr : c.order.data();
    for (int i = 0; i < c.n_query; ++i) {
        a.q[i]     = c.q.data() + i * c.n_dim;
        a.out[i]   = out.data() + i * c.n_dim;
        a.mask[i]  = c.masked ? c.mask.data() + i * c.n_kv : nullptr;
        a.slope[i] = 1.0f;
    }
    sight seen;
    seen.of(a);
    seen.give(a);
    set.attend(a);
    return out;
}

static void store(attention_case & c) {
    const auto bytes = [&](std::vector<float> & x, std::vector<uint8_t> & data) {
        data.resize(x.size() * (c.f32 ? 4 : 2));
        for (size_t i = 0; i < x.size(); ++i) {
            if (c.f32) {
                memcpy(&data[4 * i], &x[i], 4);
            } else {
                const uint16_t h = float_to_half(x[i]);
                memcpy(&data[2 * i], &h, 2);
                x[i] = half_to_float(h);
            }
        }
    };
    bytes(c.k, c.k_data);
    bytes(c.v, c.v_data);
}

static attention_case make_attention(int n_query, int n_dim, int n_kv, bool f32, bool masked, std::mt19937 & rng) {
    std::normal_distribution<float> normal(0.0f, 1.0f);
    attention_case                  c = { n_query, n_dim, n_kv, f32, masked, {}, {}, {}, {}, {}, {}, {} };
    for (std::vector<float> * x : { &c.k, &c.v }) {
        x->resize(n_kv * n_dim);
        for (float & y : *x) {
            y = normal(rng);
        }
    }
    c.q.resize(n_query * n_dim);
    for (float & y : c.q) {
        y = 3.0f * normal(rng);
    }
    c.mask.resize(n_query * n_kv);
    for (uint16_t & m : c.mask) {
        m = rng() % 4 == 0 ? 0xfc00 : 0;
    }
    for (int i = 0; i < n_query; ++i) { // all see the first half, and the last query nothing else
        for (int j = 0; j < n_kv / 2; ++j) {
            c.mask[i * n_kv + j] = 0;
        }
    }
    store(c);
    return c;
}

static void test_attention() {
    std::mt19937 rng(4);
    for (int n_query : { 1, 2, 7, 8, 13, 32 }) {
        for (int n_dim : { 3, 10, 16, 24, 64, 80, 100 }) {
            for (int n_kv : { 1, 63, 256, 300 }) {
                for (int kind = 0; kind < 4; ++kind) {
                    attention_case c = make_attention(n_query, n_dim, n_kv, kind & 1, kind & 2, rng);

                    const std::vector<float> want = attend(portable(), c);

                    // in double
                    double worst = 0.0;
                    for (int i = 0; i < n_query; ++i) {
                        std::vector<double> p(n_kv), out(n_dim);
                        double              max = -INFINITY, sum = 0.0;
                        for (int j = 0; j < n_kv; ++j) {
                            p[j] = 0.0;
                            for (int d = 0; d < n_dim; ++d) {
                                p[j] += (double) c.q[i * n_dim + d] * c.k[j * n_dim + d];
                            }
                            p[j] = c.masked && c.mask[i * n_kv + j] ? -INFINITY : p[j] / std::sqrt((double) n_dim);
                            max  = std::max(max, p[j]);
                        }
                        for (int j = 0; j < n_kv && max > -INFINITY; ++j) {
                            p[j] = std::exp(p[j] - max);
                            sum += p[j];
                            for (int d = 0; d < n_dim; ++d) {
                                out[d] += p[j] * c.v[j * n_dim + d];
                            }
                        }
                        for (int d = 0; d < n_dim; ++d) {
                            worst = std::max(worst, std::fabs(want[i * n_dim + d] - (sum > 0.0 ? out[d] / sum : 0.0)));
                        }
                    }
                    CHECK(worst < 2e-5);

                    for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
                        CHECK(same_bits(attend(**set, c), want));
                    }
                }
            }
        }
    }
}

// the cells a query sees, moved apart by cells it does not see, give the same bits
static void test_attention_holes(float unseen) {
    std::mt19937   rng(5);
    const int      n_dim = 64, n_kv = 200;
    attention_case plain = make_attention(1, n_dim, n_kv, false, false, rng);

    attention_case holes = plain;
    holes.masked         = true;
    holes.n_kv           = 0;
    holes.k.clear();
    holes.v.clear();
    holes.mask.clear();
    for (int j = 0; j < n_kv; ++j) {
        for (int hole = j > 150 ? (int) (rng() % 3) : 0; hole >= 0; --hole) {
            for (int d = 0; d < n_dim; ++d) {
                holes.k.push_back(hole ? unseen : plain.k[j * n_dim + d]);
                holes.v.push_back(hole ? unseen : plain.v[j * n_dim + d]);
            }
            holes.mask.push_back(hole ? 0xfc00 : 0);
            holes.n_kv++;
        }
    }
    store(holes);
    CHECK(holes.n_kv > n_kv);
    for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
        CHECK(same_bits(attend(**set, plain), attend(**set, holes)));
    }
}

// cells that lie in any order, among others that are empty, with the order told
static void test_attention_order() {
    std::mt19937 rng(6);
    for (const bool f32 : { false, true }) {
        const int      n_query = 9, n_dim = 44, n_kv = 150, n_room = 256;
        attention_case plain = make_attention(n_query, n_dim, n_kv, f32, true, rng);
        attention_case mixed = plain;
        mixed.n_kv           = n_room;

        std::vector<int32_t> place(n_room); // of the cell at a position; the rest is empty
        for (int j = 0; j < n_room; ++j) {
            place[j] = j;
        }
        std::shuffle(place.begin(), place.end(), rng);
        mixed.order.assign(n_room, -1);
        std::copy(place.begin(), place.begin() + n_kv, mixed.order.begin());
        mixed.k.assign(n_room * n_dim, 1000.0f);
        mixed.v.assign(n_room * n_dim, 1000.0f);
        mixed.mask.assign(n_query * n_room, 0xfc00);
        for (int j = 0; j < n_kv; ++j) {
            std::copy_n(&plain.k[j * n_dim], n_dim, &mixed.k[place[j] * n_dim]);
            std::copy_n(&plain.v[j * n_dim], n_dim, &mixed.v[place[j] * n_dim]);
            for (int i = 0; i < n_query; ++i) {
                mixed.mask[i * n_room + place[j]] = plain.mask[i * n_kv + j];
            }
        }
        store(mixed);
        for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
            CHECK(same_bits(attend(**set, plain), attend(**set, mixed)));
        }
    }
}

int main() {
    ggml_cpu_init();
    test_softmax();
    test_attention();
    test_attention_holes(1000.0f);
    test_attention_holes(INFINITY);
    test_attention_holes(NAN);
    test_attention_order();
    return check_result("test_kernels_attention");
}
