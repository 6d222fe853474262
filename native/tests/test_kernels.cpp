// The CPU kernels' products: every instruction set against the portable one, bit for bit, and against sums in double.

#include "check.h"
#include "half.h"
#include "kernel_sets.h"
#include "kernels.h"
#include "pack.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

using namespace entmtp;

static const ggml_type TYPES[] = {
    GGML_TYPE_Q4_0,   GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL,
    GGML_TYPE_MXFP4,  GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
    GGML_TYPE_IQ4_XS, GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_F32,
};

static bool has_minimum(ggml_type type) {
    return type == GGML_TYPE_Q4_1 || type == GGML_TYPE_Q5_1 || type == GGML_TYPE_Q2_K || type == GGML_TYPE_Q4_K ||
           type == GGML_TYPE_Q5_K;
}

struct matrix {
    ggml_type            type;
    weight_type          packed_as;
    int64_t              k, n_rows;
    std::vector<uint8_t> data;   // ggml's layout
    std::vector<float>   values; // what the data means, [n_rows][k]
    std::vector<uint8_t> packed;
};

static matrix make_matrix(ggml_type type, int64_t k, int64_t n_rows, std::mt19937 & rng, float size) {
    matrix m = { type, packed_type(type), k, n_rows, {}, {}, {} };

    std::normal_distribution<float> normal(0.0f, size);
    std::vector<float>              w(k * n_rows);
    for (float & x : w) {
        x = normal(rng);
    }
    m.data.resize(ggml_row_size(type, k) * n_rows);
    ggml_quantize_chunk(type, w.data(), m.data.data(), 0, n_rows, k, nullptr);
    m.values.resize(k * n_rows);
    if (type == GGML_TYPE_F32) {
        m.values = w;
    } else {
        for (int64_t r = 0; r < n_rows; ++r) {
            ggml_get_type_traits(type)->to_float(m.data.data() + r * ggml_row_size(type, k), m.values.data() + r * k,
                                                 k);
        }
    }
    m.packed.resize(packed_size(m.packed_as, k, n_rows));
    pack_panels(m.packed_as, m.data.data(), k, n_rows, 0, (n_rows + PANEL - 1) / PANEL, m.packed.data());
    return m;
}

// [n][n_rows], the tokens in one pass of the kernels
static std::vector<float> product(const kernel_set & set, const matrix & m, const std::vector<float> & x, int n) {
    const weight_layout & l        = LAYOUTS[m.packed_as];
    const int64_t         n_blocks = (m.k + l.block - 1) / l.block;

    std::vector<int8_t>  q(n_blocks * l.block * n);
    std::vector<float>   f(n_blocks * l.block * n), d(n_blocks * n);
    std::vector<int32_t> s(n_blocks * n * 16);
    const activations    a = { q.data(), f.data(), d.data(), s.data() };
    const float *        rows[16];
    for (int i = 0; i < n; ++i) {
        rows[i] = x.data() + i * m.k;
    }
    set.quantize(m.packed_as, rows, n, m.k, 0, n_blocks, a);

    std::vector<float> out(n * m.n_rows);
    for (int64_t p = 0; p * PANEL < m.n_rows; ++p) {
        float panel[16 * PANEL];
        set.matmul(m.packed_as, m.packed.data() + p * n_blocks * l.panel_bytes, n_blocks, n, a, panel);
        for (int i = 0; i < n; ++i) {
            for (int64_t r = p * PANEL; r < std::min(m.n_rows, (p + 1) * PANEL); ++r) {
                out[i * m.n_rows + r] = panel[PANEL * i + r - p * PANEL];
            }
        }
    }
    return out;
}

// ggml's own product of one token
static std::vector<float> ggml_product(const matrix & m, const float * x) {
    const ggml_type_traits_cpu * t    = ggml_get_type_traits_cpu(m.type);
    const ggml_type_traits_cpu * with = ggml_get_type_traits_cpu(t->vec_dot_type);
    std::vector<uint8_t>         q(ggml_row_size(t->vec_dot_type, m.k));
    if (t->vec_dot_type == GGML_TYPE_F32) {
        memcpy(q.data(), x, m.k * 4);
    } else {
        with->from_float(x, q.data(), m.k);
    }
    std::vector<float> out(m.n_rows);
    for (int64_t r = 0; r < m.n_rows; ++r) {
        t->vec_dot((int) m.k, &out[r], 0, m.data.data() + r * ggml_row_size(m.type, m.k), 0, q.data(), 0, 1);
    }
    return out;
}

// root mean square of the difference to the product in double
static double rms_error(const matrix & m, const std::vector<float> & x, int n, const std::vector<float> & y) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) {
        for (int64_t r = 0; r < m.n_rows; ++r) {
            double exact = 0.0;
            for (int64_t k = 0; k < m.k; ++k) {
                exact += (double) m.values[r * m.k + k] * x[i * m.k + k];
            }
            sum += std::pow(y[i * m.n_rows + r] - exact, 2);
        }
    }
    return std::sqrt(sum / (n * m.n_rows));
}

static std::vector<float>
concat_tokens(const kernel_set & set, const matrix & m, const std::vector<float> & x, int n, int at_once) {
    std::vector<float> all;
    for (int i = 0; i < n; i += at_once) {
        const int                n_i = std::min(at_once, n - i);
        const std::vector<float> xs(x.begin() + i * m.k, x.begin() + (i + n_i) * m.k);
        const std::vector<float> y = product(set, m, xs, n_i);
        all.insert(all.end(), y.begin(), y.end());
    }
    return all;
}

// a product of n tokens by all instruction sets, all numbers of tokens in a pass, ggml's own kernel, and in double
static void check_product(ggml_type type, int64_t k, int64_t n_rows, int n, std::mt19937 & rng) {
    const matrix                    m = make_matrix(type, k, n_rows, rng, 0.05f);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    std::vector<float>              x(n * k);
    for (float & v : x) {
        v = normal(rng);
    }
    const std::vector<float> want = concat_tokens(portable(), m, x, n, 1);

    std::vector<float> stock;
    for (int i = 0; i < n; ++i) {
        const std::vector<float> y = ggml_product(m, x.data() + i * k);
        stock.insert(stock.end(), y.begin(), y.end());
    }
    const double ours = rms_error(m, x, n, want), theirs = rms_error(m, x, n, stock);
    CHECK(ours <= 1.2 * theirs + 1e-6 * std::sqrt((double) k));

    // integers are the same as ggml's, so only the order of float sums tells the two apart; but with F16 and BF16 weights
    // it rounds activations to that, and where blocks of 32 have a minimum their scaled sums to F16
    double difference = 0.0;
    for (size_t i = 0; i < want.size(); ++i) {
        difference = std::max(difference, (double) std::fabs(want[i] - stock[i]));
    }
    const bool alike =
        type != GGML_TYPE_F16 && type != GGML_TYPE_BF16 && type != GGML_TYPE_Q4_1 && type != GGML_TYPE_Q5_1;
    double allowed = 1e-6 * std::sqrt((double) k);
#ifdef __aarch64__
    // compilers fuse the product and the rounding in ggml's plain C++ for blocks of 256, so that a tie may go the other way:
    // one integer of one activation, times a weight
    if (ggml_blck_size(type) == 256) {
        float top = 0.0f;
        for (float v : x) {
            top = std::max(top, std::fabs(v));
        }
        float most = 0.0f;
        for (float v : m.values) {
            most = std::max(most, std::fabs(v));
        }
        allowed += top / 127 * most;
    }
#endif
    if (alike && !CHECK(difference <= allowed)) {
        fprintf(stderr, "%s %d x %d: %g from ggml's; errors %g and %g\n", ggml_type_name(type), (int) n_rows, (int) k,
                difference, ours, theirs);
    }

    for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
        const int group = LAYOUTS[m.packed_as].bits == 0 ? (*set)->group_float : (*set)->group;
        for (int at_once = 1; at_once <= group; ++at_once) {
            if (!CHECK(same_bits(concat_tokens(**set, m, x, n, at_once), want))) {
                fprintf(stderr, "%s %s %d x %d, %d tokens\n", (*set)->name, ggml_type_name(type), (int) n_rows, (int) k,
                        at_once);
                return;
            }
        }
    }
}

static void test_products() {
    std::mt19937 rng(1);
    for (ggml_type type : TYPES) {
        const int64_t block = ggml_blck_size(type);
        for (int64_t n_rows : { 1, 15, 16, 17, 40 }) {
            for (int64_t k : { block, 3 * block, block == 1 ? (int64_t) 77 : 5 * block, (int64_t) 1024 }) {
                check_product(type, k, n_rows, 16, rng);
            }
        }
        for (int i = 0; i < 20; ++i) { // shapes of all kinds
            check_product(type, block * (1 + rng() % (block == 1 ? 700 : 2048 / block)), 1 + rng() % 70, 1 + rng() % 16,
                          rng);
        }
    }
}

// what can go wrong in integers and at the ends of the float range
static void test_extremes() {
    std::mt19937 rng(2);
    const float  inf = INFINITY, nan = NAN, tiny = 1e-41f;

    for (ggml_type type : TYPES) {
        matrix m = make_matrix(type, 512, 32, rng, 1.0f);

        // random bytes as weights: every bit pattern of the blocks, but finite scales
        if (ggml_is_quantized(type)) {
            const size_t size = ggml_type_size(type);
            for (size_t i = 0; i < m.data.size(); ++i) {
                m.data[i] = (uint8_t) rng();
            }
            for (size_t b = 0; b < m.data.size(); b += size) {
                if (type == GGML_TYPE_MXFP4) {
                    m.data[b] = (uint8_t) (119 + rng() % 3); // an exponent
                    continue;
                }
                const uint16_t d      = float_to_half(std::ldexp(1.0f + (float) (rng() % 100) / 100, -8));
                const bool     at_end = type == GGML_TYPE_Q6_K || type == GGML_TYPE_Q3_K;
                const size_t   at     = at_end ? size - 2 : type == GGML_TYPE_Q2_K ? size - 4 : 0;
                memcpy(&m.data[b + at], &d, 2);
                if (has_minimum(type)) {
                    memcpy(&m.data[b + at + 2], &d, 2);
                }
            }
            for (int64_t r = 0; r < m.n_rows; ++r) {
                ggml_get_type_traits(type)->to_float(m.data.data() + r * ggml_row_size(type, m.k),
                                                     m.values.data() + r * m.k, m.k);
            }
            pack_panels(m.packed_as, m.data.data(), m.k, m.n_rows, 0, 2, m.packed.data());
        }

        const std::vector<std::vector<float>> patterns = {
            { 1.0f },          { -1.0f },       { 1.0f, -1.0f }, { 0.0f },        { tiny, -tiny },
            { 1e30f, -1e30f }, { 1.0f, 1e-6f }, { -0.0f },       { 3e38f, 1.0f },
        };
        for (const std::vector<float> & pattern : patterns) {
            std::vector<float> x(m.k);
            for (int64_t k = 0; k < m.k; ++k) {
                x[k] = pattern[k % pattern.size()];
            }
            const std::vector<float> want = product(portable(), m, x, 1);
            for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
                CHECK(same_bits(product(**set, m, x, 1), want));
            }
            if (std::fabs(pattern[0]) == 1.0f && pattern.size() == 1) { // exact in 8 bits but for the rounded scale
                const double size = std::sqrt((double) m.k) * 60;
                CHECK(rms_error(m, x, 1, want) <= 2e-3 * size);
            }
        }

        // what is not a number does not become one, and stays with its token
        for (float bad : { nan, inf, -inf }) {
            std::vector<float> x(3 * m.k, 1.0f);
            x[m.k + 100] = bad;
            x[m.k + 103] = -bad;
            for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
                const std::vector<float> y = product(**set, m, x, 3);
                for (int64_t r = 0; r < m.n_rows; ++r) {
                    CHECK(std::isfinite(y[r]) && std::isfinite(y[2 * m.n_rows + r]));
                    CHECK(!std::isfinite(y[m.n_rows + r]) || m.values[r * m.k + 100] == 0.0f);
                }
            }
        }
    }
}

// the integers of activations: halves to even, and what does not fit or is no number
static void test_quantize() {
    const int64_t      k = 512;
    std::vector<float> x(4 * k);
    for (int64_t i = 0; i < k; ++i) {
        x[i]         = i % 32 == 0 ? 127.0f : (float) (i % 255 - 127) / 2; // every second one lies between two integers
        x[k + i]     = i % 3 == 0 ? 1e-41f : -1e-41f;                      // 127 divided by it is infinite
        x[2 * k + i] = i == 5 ? INFINITY : (float) i;
        x[3 * k + i] = i == 300 ? NAN : 3e38f;
    }
    for (weight_type type :
         { W_Q4_0, W_Q4_1, W_Q5_0, W_Q8_0, W_IQ4_NL, W_Q2_K, W_Q3_K, W_Q4_K, W_Q5_K, W_Q6_K, W_IQ4_XS }) {
        const int64_t        n_blocks = k / LAYOUTS[type].block;
        std::vector<int8_t>  q[2]     = { std::vector<int8_t>(4 * k), std::vector<int8_t>(4 * k) };
        std::vector<float>   d[2]     = { std::vector<float>(4 * n_blocks), std::vector<float>(4 * n_blocks) };
        std::vector<int32_t> s(4 * n_blocks * 16);
        const float *        rows[] = { x.data(), x.data() + k, x.data() + 2 * k, x.data() + 3 * k };
        portable().quantize(type, rows, 4, k, 0, n_blocks, { q[0].data(), nullptr, d[0].data(), s.data() });
        CHECK(q[0][1] == -63 && q[0][2] == -62 && q[0][4] == -62); // of -63, -62.5 and -61.5
        for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
            (*set)->quantize(type, rows, 4, k, 0, n_blocks, { q[1].data(), nullptr, d[1].data(), s.data() });
            CHECK(q[0] == q[1] && same_bits(d[0], d[1]));
        }
    }
}

static void test_half() {
    for (uint32_t h = 0; h < 65536; ++h) {
        const float x = half_to_float((uint16_t) h);
        const float y = ggml_fp16_to_fp32((ggml_fp16_t) h);
        CHECK(memcmp(&x, &y, 4) == 0 || (std::isnan(x) && std::isnan(y)));
        CHECK(std::isnan(x) || float_to_half(x) == h);
    }
    std::mt19937 rng(3);
    for (int i = 0; i < 200000; ++i) {
        const uint32_t bits = rng();
        float          x;
        memcpy(&x, &bits, 4);
        CHECK(std::isnan(x) || float_to_half(x) == ggml_fp32_to_fp16(x));
    }
}

// rows taken out of panels are the panels of these rows
static void test_copied_rows() {
    std::mt19937 rng(9);
    for (const ggml_type type : TYPES) {
        const bool    plain = !ggml_is_quantized(type);
        const int64_t k     = plain ? 72 : 512;
        const matrix  m     = make_matrix(type, k, 53, rng, 1.0f);
        const size_t  size  = ggml_row_size(type, k);

        for (const std::vector<int32_t> & ids :
             { std::vector<int32_t>{ 52 },
               { 0, 1, 15, 16, 17, 31, 32, 40, 41, 42, 43, 44, 45, 46, 47, 48, 50, 51, 52 } }) {
            std::vector<uint8_t> rows;
            for (const int32_t id : ids) {
                rows.insert(rows.end(), m.data.begin() + id * size, m.data.begin() + (id + 1) * size);
            }
            const int64_t        n = (int64_t) ids.size();
            std::vector<uint8_t> expected(packed_size(m.packed_as, k, n));
            std::vector<uint8_t> got(expected.size(), 0xaa);
            pack_panels(m.packed_as, rows.data(), k, n, 0, (n + PANEL - 1) / PANEL, expected.data());
            copy_packed_rows(m.packed_as, k, m.packed.data(), ids.data(), n, got.data());
            CHECK(expected == got);
        }
    }
}

// the sets of this processor are those named; the portable one is in every list
static void test_dispatch(int n, char ** names) {
    int i = 0;
    for (const kernel_set * const * set = kernel_sets(); *set; ++set, ++i) {
        printf("%s ", (*set)->name);
        CHECK(n == 0 || (i < n && strcmp((*set)->name, names[i]) == 0));
    }
    printf("\n");
    CHECK(n == 0 || i == n);
    CHECK(strcmp(portable().name, "portable") == 0);
}

// usage: test_kernels [the sets that must be found, best first]
int main(int argc, char ** argv) {
    ggml_cpu_init();
    test_dispatch(argc - 1, argv + 1);
    test_half();
    test_quantize();
    test_products();
    test_extremes();
    test_copied_rows();
    return check_result("test_kernels");
}
