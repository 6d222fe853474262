// CPU kernels for passes of few tokens: what an instruction set provides, and how weights and activations are laid out.
//
// A result never depends on how many tokens are in the pass, on the number of threads, or on the instruction set:
// sums of integers are exact, sums of floats have one order, written down with each kernel. docs/kernels.md follows one
// tile through this code.

#pragma once

#include <cstddef>
#include <cstdint>

namespace entmtp {

// Weights are held in panels of 16 rows, block after block along k. One line is [16 rows][4 k] bytes, so that an
// instruction that multiplies 4 bytes per lane finds 16 rows in its lanes.
constexpr int PANEL = 16;

enum weight_type {
    W_Q4_0,
    W_Q4_1,
    W_Q5_0,
    W_Q5_1,
    W_Q8_0,
    W_IQ4_NL,
    W_MXFP4,
    W_Q2_K,
    W_Q3_K,
    W_Q4_K,
    W_Q5_K,
    W_Q6_K,
    W_IQ4_XS,
    W_F16,
    W_BF16,
    W_F32,
    W_COUNT
};

struct weight_layout {
    int block;       // k per block
    int panel_bytes; // bytes of one block of one panel
    int sums;        // int32 kept with each block of activations
    int bits;        // of the weights of integer types; 0: float, activations stay float
    int offset;      // taken from the integers as they are held; MINIMUM: none, weights have a minimum instead
};

constexpr int BYTE    = 128; // added to weights of 8 bits, where the instruction set wants them positive
constexpr int MINIMUM = -1;

// [W_COUNT]
constexpr weight_layout LAYOUTS[] = {
    { 32, PANEL * 18, 1, 4, 8 },         // d f16, 4 lines of nibbles: line j holds lines j and j + 4
    { 32, PANEL * 20, 1, 4, MINIMUM },   // d f16, m f16, 4 lines of nibbles
    { 32, PANEL * 22, 1, 5, 16 },        // d f16, 4 lines of nibbles, 1 line of upper bits: bit j is of line j
    { 32, PANEL * 24, 1, 5, MINIMUM },   // d f16, m f16, 4 lines of nibbles, 1 line of upper bits
    { 32, PANEL * 34, 1, 8, BYTE },      // d f16, 8 lines of bytes with 128 added
    { 32, PANEL * 18, 1, 8, BYTE },      // d f16, 4 lines of nibbles, which stand for bytes
    { 32, PANEL * 17, 1, 8, BYTE },      // exponent of the scale, 4 lines of nibbles, which stand for bytes
    { 256, PANEL * 84, 8, 2, MINIMUM },  // d f16, dmin f16, 16 bytes of 4-bit scales and mins, 16 lines of 2 bits
    { 256, PANEL * 114, 16, 3, 4 },      // d f16, 16 int8 scales, 8 times 2 lines of 2 bits and 1 of upper bits
    { 256, PANEL * 144, 4, 4, MINIMUM }, // d f16, dmin f16, 12 x 16 bytes of 6-bit scales and mins, 32 lines of nibbles
    { 256, PANEL * 176, 4, 5, MINIMUM }, // the same, with 1 line of upper bits after every 4 lines of nibbles
    { 256, PANEL * 210, 16, 6, 32 },     // d f16, 16 int8 scales, 8 times 4 lines of nibbles and 2 of upper bits
    { 256, PANEL * 138, 8, 8, BYTE },    // d f16, 8 int8 scales, 32 lines of nibbles, which stand for bytes
    { 32, PANEL * 64, 0, 0, 0 },         // [32 k][16 rows] f16
    { 32, PANEL * 64, 0, 0, 0 },         // [32 k][16 rows] bf16
    { 32, PANEL * 128, 0, 0, 0 },        // [32 k][16 rows] f32
};

// Activations of n tokens, block after block, tokens side by side: [n_blocks][n][block]
struct activations {
    int8_t *  q; // integers, or
    float *   f; // floats
    float *   d; // [n_blocks][n] scale
    int32_t * s; // [n_blocks][n][sums] sums of q times what the kernel needs; for mins of blocks of 256, pairs of sums
};

// attention of the queries of one kv head
struct attention {
    int n_query; // queries of this task, at most 32
    int n_kv;
    int n_dim_k, n_dim_v;

    const uint8_t * k;                  // [n_kv] rows
    const uint8_t * v;
    size_t          k_stride, v_stride; // bytes
    int             k_type, v_type;     // ggml_type
    void (*k_to_float)(const void *, float *, int64_t);
    void (*v_to_float)(const void *, float *, int64_t);

    const float *    q[32];     // [n_dim_k]
    float *          out[32];   // [n_dim_v]
    const uint16_t * mask[32];  // f16 [n_kv]; null: all cells are seen
    const int32_t *  order;     // [n_kv] cells by position, then -1; null: they lie in that order
    const int32_t *  cells;     // [n_cells] that anyone sees, by position (sight.h)
    const uint32_t * who;       // [n_cells] queries that see each, a bit each
    int              n_cells;
    bool             in_line;   // they lie one after the other
    float            slope[32]; // of the mask
    const float *    sink[32];  // null: none
    float            scale, softcap;

    float * scratch; // [attention_scratch()] floats
};

constexpr int ATTENTION_QUERIES = 32;
constexpr int ATTENTION_ROWS    = 64; // cells that are dequantised at a time

// floats from one row of scores to the next: room for a last whole vector, and not a multiple of 4096 bytes
inline size_t attention_stride(int n_kv) {
    return ((size_t) n_kv + 31) / 16 * 16 + 16;
}

inline size_t attention_scratch(int n_kv, int n_dim_k, int n_dim_v) {
    const size_t n_pad = attention_stride(n_kv);
    const size_t n_dim = n_dim_k > n_dim_v ? n_dim_k : n_dim_v;
    return ATTENTION_QUERIES * n_pad + n_pad + ATTENTION_QUERIES * n_dim * 2 + ATTENTION_ROWS * n_dim + 64 * 16 + 64;
}

struct kernel_set {
    const char * name;
    int          group;       // tokens per pass over integer weights, at most 16
    int          group_float; // the same for float weights

    // quantise n rows of k floats. NaN or an infinity makes the scale of its block not finite, and with it the results
    void (*quantize)(
        weight_type type, const float * const * x, int n, int64_t k, int64_t b0, int64_t b1, const activations & a);

    // out[i][16] = panel times token i
    //   n at most the group
    void (*matmul)(
        weight_type type, const uint8_t * panel, int64_t n_blocks, int n, const activations & a, float * out);

    // c[i][m] = sum over k, in order, of a[m][k]*b[i][k], for rows m0 to m1. A zero in b takes its k out of the sum
    // without a trace, so cells that a token does not see may lie anywhere
    void (*matmul_ordered)(const uint8_t *       a,
                           size_t                a_stride,
                           bool                  a_f32,
                           int                   m0,
                           int                   m1,
                           int                   k,
                           const float * const * b,
                           int                   n,
                           float * const *       c);

    void (*attend)(const attention & a);

    // dst = softmax(scale*src + slope*mask); masked cells become 0. mask: f16 or f32, or neither
    void (*softmax)(const float *    src,
                    const uint16_t * mask,
                    const float *    mask_f32,
                    float *          dst,
                    int              n,
                    float            scale,
                    float            slope,
                    const float *    sink);

    // multiply-adds of n_steps rounds of independent int8 dot products in registers: the peak of the machine. null: unknown
    int64_t (*int8_peak)(int64_t n_steps);
};

// kernels of this processor, best first, ended by null; the last is portable C++
const kernel_set * const * kernel_sets();

} // namespace entmtp
