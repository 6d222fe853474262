// Attention over a cache whose cells may lie in any place, for one instruction set: included after its `simd`.
//
// Scores and values are summed in one order: dimension after dimension, and cell after cell of those that a token sees, by
// position. The maximum and the sum of the probabilities are exact. So the cells of other branches of a tree and of other
// sequences leave no trace in the result, nor does the place where a cell lies.

static inline simd::vf load_weights(const uint16_t * p) {
    return simd::load_f16(p);
}
static inline simd::vf load_weights(const float * p) {
    return simd::loadf(p);
}

// exp(x) for x <= 0, relative error below 2e-7; 0 below -87
static inline simd::vf exp_neg(simd::vf x) {
    const simd::vf y = simd::maxf(simd::set1f(-88.0f), x); // NaN stays NaN: see maxf
    const simd::vi n = simd::round(simd::mulf(y, simd::set1f(1.44269504f)));
    const simd::vf f = simd::cvt(n);
    simd::vf       r = simd::fma(f, simd::set1f(-0.693145752f), y);
    r                = simd::fma(f, simd::set1f(-1.42860677e-6f), r);
    simd::vf p       = simd::set1f(1.0f / 5040);
    p                = simd::fma(p, r, simd::set1f(1.0f / 720));
    p                = simd::fma(p, r, simd::set1f(1.0f / 120));
    p                = simd::fma(p, r, simd::set1f(1.0f / 24));
    p                = simd::fma(p, r, simd::set1f(1.0f / 6));
    p                = simd::fma(p, r, simd::set1f(0.5f));
    p                = simd::fma(p, r, simd::set1f(1.0f));
    p                = simd::fma(p, r, simd::set1f(1.0f));
    return simd::zero_if_less(x, -87.0f, simd::mulf(p, simd::exp2i(n)));
}

static inline float exp_neg1(float x) {
    float t[simd::R];
    simd::storef(t, exp_neg(simd::set1f(x)));
    return t[0];
}

static constexpr float NEG_INF = -HUGE_VALF, LOWEST = -3.40282347e38f; // of those that are finite

// s <- probabilities, not yet divided by their sum, which is returned. s has room for whole vectors
//   NaN among the scores makes the sum NaN
static double softmax_row(float *          s,
                          const uint16_t * mask,
                          const float *    mask_f32,
                          int              n,
                          float            scale,
                          float            softcap,
                          float            slope,
                          const float *    sink) {
    const int n_pad = (n + simd::R - 1) / simd::R * simd::R;
    for (int i = n; i < n_pad; ++i) {
        s[i] = NEG_INF;
    }

    simd::vf top = simd::set1f(NEG_INF);
    for (int i = 0; i < n_pad; i += simd::R) {
        simd::vf x = simd::mulf(simd::loadf(s + i), simd::set1f(scale));
        if (softcap != 0.0f) {
            float t[simd::R];
            simd::storef(t, x);
            for (float & y : t) {
                y = softcap * std::tanh(y);
            }
            x = simd::loadf(t);
        }
        if (mask || mask_f32) {
            simd::vf m;
            if (i + simd::R <= n) {
                m = mask ? simd::load_f16(mask + i) : simd::loadf(mask_f32 + i);
            } else {
                float last[simd::R];
                for (int j = 0; j < simd::R; ++j) {
                    last[j] = i + j >= n ? NEG_INF : mask ? half_to_float(mask[i + j]) : mask_f32[i + j];
                }
                m = simd::loadf(last);
            }
            // a cell that is not seen leaves no trace, whatever its score is: an infinity or NaN that is added stays
            x = simd::if_less(m, LOWEST, m, simd::addf(simd::mulf(simd::set1f(slope), m), x));
        }
        simd::storef(s + i, x);
        top = simd::maxf(x, top);
    }
    float max = simd::reduce_max(top);
    if (sink) {
        max = *sink > max ? *sink : max;
    }
    if (max == NEG_INF) { // sees nothing
        memset(s, 0, n_pad * sizeof(float));
        return 0.0;
    }

    simd::exact_sum sum;
    for (int i = 0; i < n_pad; i += simd::R) {
        const simd::vf x = simd::loadf(s + i);
        const simd::vf p = exp_neg(simd::subf(x, simd::set1f(max)));
        simd::storef(s + i, p);
        sum.add(p);
    }
    return sum.get() + (sink ? (double) exp_neg1(*sink - max) : 0.0);
}

static void softmax(const float *    src,
                    const uint16_t * mask,
                    const float *    mask_f32,
                    float *          dst,
                    int              n,
                    float            scale,
                    float            slope,
                    const float *    sink) {
    // rows that do not end with a whole vector go through a copy, as dst has no room after them
    float   local[1024];
    float * row = n % simd::R == 0      ? dst
                  : n <= 1024 - simd::R ? local
                                        : (float *) malloc((n + simd::R) * sizeof(float));
    memmove(row, src, n * sizeof(float));
    const double sum = softmax_row(row, mask, mask_f32, n, scale, 0.0f, slope, sink);
    const float  inv = sum == 0.0 ? 0.0f : (float) (1.0 / sum);
    for (int i = 0; i < n; ++i) {
        dst[i] = row[i] * inv;
    }
    if (row != dst && row != local) {
        free(row);
    }
}

// simd::SUMS_F sums at a time: enough to keep the unit busy, as each waits for the fused multiply-add before it, and few
// enough for the registers.
static constexpr int ROWS      = 64; // rows at a time
static constexpr int K_AT_ONCE = 64; // k whose transposed rows stay in the first cache

// sums[i] += rows*b[i], k after k, for nt tokens and n_r rows. rows [ROWS/R][K_AT_ONCE][R], sums [nt][ROWS]
template <int nt, int nv = simd::SUMS_F / nt>
void add_ordered(const float * rows, int n_r, int n_k, const float * const * b, int k0, float * sums) {
    constexpr int R = simd::R;

    int r = 0;
    for (; r + (nv - 1) * R < n_r; r += nv * R) {
        simd::vf s[nv][nt];
        for (int v = 0; v < nv; ++v) {
            for (int t = 0; t < nt; ++t) {
                s[v][t] = simd::loadf(sums + t * ROWS + r + v * R);
            }
        }
        const float * x = rows + r * K_AT_ONCE;
        for (int j = 0; j < n_k; ++j) {
            for (int v = 0; v < nv; ++v) {
                const simd::vf w = simd::loadf(x + (v * K_AT_ONCE + j) * R);
                for (int t = 0; t < nt; ++t) {
                    s[v][t] = simd::fma(w, simd::set1f(b[t][k0 + j]), s[v][t]);
                }
            }
        }
        for (int v = 0; v < nv; ++v) {
            for (int t = 0; t < nt; ++t) {
                simd::storef(sums + t * ROWS + r + v * R, s[v][t]);
            }
        }
    }
    if constexpr (nv > 1) {
        if (r < n_r) {
            add_ordered<nt, nv / 2>(rows + r * K_AT_ONCE, n_r - r, n_k, b, k0, sums + r);
        }
    }
}

// the first n_r rows and n_k k of a, transposed: out [ROWS/R][K_AT_ONCE][R]
//   Rows lie far apart, which the processor does not foresee: it is told of the rows, and with `more` of the k, to come.
static void transpose_rows(const uint8_t * a, size_t stride, bool a_f32, int n_r, int n_k, bool more, float * out) {
    constexpr int R    = simd::R;
    const int     size = a_f32 ? 4 : 2;
    for (int r = 0; r < n_r; r += R) {
        for (int i = 0; i < R; ++i) {
            const uint8_t * row = a + (size_t) (r + i) * stride;
            prefetch(more ? row + K_AT_ONCE * size : row + R * stride, K_AT_ONCE * size);
        }
        for (int j = 0; j < n_k; j += R) {
            const uint8_t * p = a + (size_t) r * stride + (size_t) j * size;
            float *         o = out + r * K_AT_ONCE + j * R;
            if (n_r - r >= R && n_k - j >= R) {
                a_f32 ? simd::transpose_f32(p, stride, o) : simd::transpose_f16(p, stride, o);
                continue;
            }
            for (int jj = 0; jj < R && j + jj < n_k; ++jj) {
                for (int i = 0; i < R; ++i) {
                    const uint8_t * e = p + (size_t) (r + i < n_r ? i : 0) * stride + (size_t) jj * size;
                    o[jj * R + i]     = a_f32 ? *(const float *) e : half_to_float(*(const uint16_t *) e);
                }
            }
        }
    }
}

// c[i][m] = sum over k, in order, of a[m][k]*b[i][k]
static void matmul_ordered(const uint8_t *       a,
                           size_t                a_stride,
                           bool                  a_f32,
                           int                   m0,
                           int                   m1,
                           int                   k,
                           const float * const * b,
                           int                   n,
                           float * const *       c) {
    constexpr int NB = 32; // tokens whose sums stay in the first cache
    constexpr int NT = simd::R == 16 ? 8 : 4;

    alignas(64) float rows[ROWS * K_AT_ONCE];
    alignas(64) float sums[NB][ROWS];

    for (int i0 = 0; i0 < n; i0 += NB) {
        const int n_i = n - i0 < NB ? n - i0 : NB;
        for (int m = m0; m < m1; m += ROWS) {
            const int n_r = m1 - m < ROWS ? m1 - m : ROWS;
            memset(sums, 0, n_i * sizeof(sums[0]));

            for (int k0 = 0; k0 < k; k0 += K_AT_ONCE) {
                const int       n_k = k - k0 < K_AT_ONCE ? k - k0 : K_AT_ONCE;
                const uint8_t * at  = a + (size_t) m * a_stride + (size_t) k0 * (a_f32 ? 4 : 2);
                transpose_rows(at, a_stride, a_f32, n_r, n_k, k0 + K_AT_ONCE < k, rows);

                int i = 0;
                for (; i + NT <= n_i; i += NT) {
                    add_ordered<NT>(rows, n_r, n_k, b + i0 + i, k0, sums[i]);
                }
                for (; i + 2 <= n_i; i += 2) {
                    add_ordered<2>(rows, n_r, n_k, b + i0 + i, k0, sums[i]);
                }
                if (i < n_i) {
                    add_ordered<1>(rows, n_r, n_k, b + i0 + i, k0, sums[i]);
                }
            }
            for (int i = 0; i < n_i; ++i) {
                memcpy(c[i0 + i] + m, sums[i], n_r * sizeof(float));
            }
        }
    }
}

// out[i] += p[i][j]*v[j], cell after cell, for nv vectors of dimensions. v rows are f16 or f32
template <class T, int nq, int nv>
void add_value_vectors(
    const uint8_t * v, size_t stride, int n_cells, int n_dim, int d, const float * p, size_t ldp, float * out) {
    constexpr int R = simd::R;
    simd::vf      s[nv][nq];
    for (int i = 0; i < nq; ++i) {
        for (int l = 0; l < nv; ++l) {
            s[l][i] = simd::loadf(out + i * n_dim + d + l * R);
        }
    }
    for (int j = 0; j < n_cells; ++j) {
        const T * row = (const T *) (v + j * stride) + d;
        simd::vf  x[nv];
        for (int l = 0; l < nv; ++l) {
            x[l] = load_weights(row + l * R);
        }
        for (int i = 0; i < nq; ++i) {
            const simd::vf pi = simd::set1f(p[i * ldp + j]);
            for (int l = 0; l < nv; ++l) {
                s[l][i] = simd::fma(pi, x[l], s[l][i]);
            }
        }
    }
    for (int i = 0; i < nq; ++i) {
        for (int l = 0; l < nv; ++l) {
            simd::storef(out + i * n_dim + d + l * R, s[l][i]);
        }
    }
}

// the same for the last dimensions, where they fill no vector
template <class T, int nq>
void add_last_values(
    const uint8_t * v, size_t stride, int n_cells, int n_dim, int d, const float * p, size_t ldp, float * out) {
    constexpr int R       = simd::R;
    const int     n       = n_dim - d;
    float         sums[R] = {};
    T             part[R] = {};
    simd::vf      s[nq];
    for (int i = 0; i < nq; ++i) {
        memcpy(sums, out + i * n_dim + d, n * sizeof(float));
        s[i] = simd::loadf(sums);
    }
    for (int j = 0; j < n_cells; ++j) {
        memcpy(part, (const T *) (v + j * stride) + d, n * sizeof(T));
        const simd::vf x = load_weights(part);
        for (int i = 0; i < nq; ++i) {
            s[i] = simd::fma(simd::set1f(p[i * ldp + j]), x, s[i]);
        }
    }
    for (int i = 0; i < nq; ++i) {
        simd::storef(sums, s[i]);
        memcpy(out + i * n_dim + d, sums, n * sizeof(float));
    }
}

template <class T, int nq>
void add_values(const uint8_t * v, size_t stride, int n_cells, int n_dim, const float * p, size_t ldp, float * out) {
    constexpr int nv = simd::R == 16 ? 2 : 16 / simd::R;
    int           d  = 0;
    for (; d + nv * simd::R <= n_dim; d += nv * simd::R) {
        add_value_vectors<T, nq, nv>(v, stride, n_cells, n_dim, d, p, ldp, out);
    }
    for (; d + simd::R <= n_dim; d += simd::R) {
        add_value_vectors<T, nq, 1>(v, stride, n_cells, n_dim, d, p, ldp, out);
    }
    if (d < n_dim) {
        add_last_values<T, nq>(v, stride, n_cells, n_dim, d, p, ldp, out);
    }
}

template <class T>
void add_values(
    const uint8_t * v, size_t stride, int n_cells, int n_dim, int n, const float * p, size_t ldp, float * out) {
    constexpr int nq = simd::GF;
    int           i  = 0;
    for (; i + nq <= n; i += nq) {
        add_values<T, nq>(v, stride, n_cells, n_dim, p + i * ldp, ldp, out + (size_t) i * n_dim);
    }
    for (; i + 2 <= n; i += 2) {
        add_values<T, 2>(v, stride, n_cells, n_dim, p + i * ldp, ldp, out + (size_t) i * n_dim);
    }
    if (i < n) {
        add_values<T, 1>(v, stride, n_cells, n_dim, p + i * ldp, ldp, out + (size_t) i * n_dim);
    }
}

// rows of some cells, one after the other: in the cache, where they lie so, or copied or dequantised to `copy`
struct cache_rows {
    const uint8_t * at;
    size_t          stride; // bytes
    bool            f32;
};

static cache_rows read_rows(const uint8_t * cache,
                            size_t          stride,
                            bool            f32,
                            int             n_dim,
                            void (*to_float)(const void *, float *, int64_t),
                            const int32_t * cells,
                            int             n,
                            float *         copy) {
    if (to_float) {
        for (int j = 0; j < n; ++j) {
            to_float(cache + (size_t) cells[j] * stride, copy + (size_t) j * n_dim, n_dim);
        }
        return { (const uint8_t *) copy, n_dim * sizeof(float), true };
    }
    bool in_line = true;
    for (int j = 1; j < n; ++j) {
        in_line = in_line && cells[j] == cells[0] + j;
    }
    if (in_line) {
        return { cache + (size_t) cells[0] * stride, stride, f32 };
    }
    const size_t size = (size_t) n_dim * (f32 ? 4 : 2);
    for (int j = 0; j < n; ++j) {
        memcpy((uint8_t *) copy + j * size, cache + (size_t) cells[j] * stride, size);
    }
    return { (const uint8_t *) copy, size, f32 };
}

static void attend(const attention & a) {
    const int    n     = a.n_query;
    const size_t ld    = attention_stride(a.n_kv);
    const int    n_dim = a.n_dim_k > a.n_dim_v ? a.n_dim_k : a.n_dim_v;

    float *    scores = a.scratch;                                      // [n][ld]
    uint16_t * masked = (uint16_t *) (scores + ATTENTION_QUERIES * ld); // [ld] the mask of one query at the cells
    float *    out    = (float *) (masked + 2 * ld);                    // [n][n_dim_v]
    float *    rows   = out + 2 * ATTENTION_QUERIES * n_dim;            // [ATTENTION_ROWS][n_dim] copied, dequantised

    const uint32_t  all     = n == 32 ? 0xffffffffu : (1u << n) - 1;
    const int32_t * cells   = a.cells;
    const int       n_cells = a.n_cells;

    float * c[ATTENTION_QUERIES];
    for (int j = 0; j < n_cells; j += ATTENTION_ROWS) {
        const int n_j = n_cells - j < ATTENTION_ROWS ? n_cells - j : ATTENTION_ROWS;
        for (int i = 0; i < n; ++i) {
            c[i] = scores + i * ld + j;
        }
        const cache_rows k = read_rows(a.k, a.k_stride, a.k_type == 0, a.n_dim_k, a.k_to_float, cells + j, n_j, rows);
        matmul_ordered(k.at, k.stride, k.f32, 0, n_j, a.n_dim_k, a.q, n, c);
    }

    float inv[ATTENTION_QUERIES];
    for (int i = 0; i < n; ++i) {
        const uint16_t * m = a.mask[i];
        if (m && a.in_line) {
            m += n_cells > 0 ? cells[0] : 0;
        } else if (m) {
            for (int j = 0; j < n_cells; ++j) {
                masked[j] = m[cells[j]];
            }
            m = masked;
        }
        const double sum = softmax_row(scores + i * ld, m, nullptr, n_cells, a.scale, a.softcap, a.slope[i], a.sink[i]);
        inv[i]           = sum == 0.0 ? 0.0f : (float) (1.0 / sum);
    }

    memset(out, 0, (size_t) n * a.n_dim_v * sizeof(float));
    for (int j0 = 0; j0 < n_cells; j0 += ATTENTION_ROWS) {
        const int        n_tile = n_cells - j0 < ATTENTION_ROWS ? n_cells - j0 : ATTENTION_ROWS;
        const cache_rows v =
            read_rows(a.v, a.v_stride, a.v_type == 0, a.n_dim_v, a.v_to_float, cells + j0, n_tile, rows);
        for (int j = j0; j < j0 + n_tile;) {
            // a run of cells that all see, or one cell
            const uint32_t who = a.who[j];
            int            n_j = 1;
            while (who == all && j + n_j < j0 + n_tile && a.who[j + n_j] == all) {
                ++n_j;
            }
            const uint8_t * row = v.at + (size_t) (j - j0) * v.stride;
            for (int i = 0; i < n; ++i) {
                if (!(who >> i & 1)) {
                    continue;
                }
                const int n_i = who == all ? n : 1;
                v.f32 ? add_values<float>(row, v.stride, n_j, a.n_dim_v, n_i, scores + i * ld + j, ld,
                                          out + (size_t) i * a.n_dim_v)
                      : add_values<uint16_t>(row, v.stride, n_j, a.n_dim_v, n_i, scores + i * ld + j, ld,
                                             out + (size_t) i * a.n_dim_v);
                i += n_i - 1;
            }
            j += n_j;
        }
    }

    for (int i = 0; i < n; ++i) {
        for (int d = 0; d < a.n_dim_v; ++d) {
            a.out[i][d] = out[(size_t) i * a.n_dim_v + d] * inv[i];
        }
    }
}
