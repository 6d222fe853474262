// Heads files made and loaded, for the tests of the heads.

#pragma once

#include "entmtp.h"

#include "check.h"
#include "tiny.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

using tiny::head_options;

struct heads_deleter {
    void operator()(entmtp_heads * p) { entmtp_heads_free(p); }
};
using heads_ptr = std::unique_ptr<entmtp_heads, heads_deleter>;

inline tiny::folder    dir;
inline tiny::model_ptr base;

inline heads_ptr load(const std::string & path) {
    return heads_ptr(entmtp_heads_load(path.c_str(), base.get(), 1));
}

inline heads_ptr load(const head_options & o) {
    heads_ptr h = load(tiny::write_heads(dir / "heads.gguf", o));
    if (!h) {
        check_failed(__FILE__, __LINE__, std::string("did not load: ") + entmtp_last_error());
    }
    return h;
}

// the file is refused, and the sentence names the culprit
inline void refused(const char * what, const std::string & path, std::initializer_list<const char *> parts) {
    const heads_ptr h = load(path);
    if (h) {
        check_failed(__FILE__, __LINE__, std::string(what) + ": loaded");
        return;
    }
    for (const char * part : parts) {
        if (!CHECK_HAS(entmtp_last_error(), part)) {
            fprintf(stderr, "  in: %s\n", what);
        }
    }
}

inline void refused(const char * what, const head_options & o, std::initializer_list<const char *> parts) {
    refused(what, tiny::write_heads(dir / "bad.gguf", o), parts);
}

inline std::vector<float> random_vector(int32_t n, uint32_t seed) {
    std::mt19937                    rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float>              res(n);
    for (auto & x : res) {
        x = normal(rng);
    }
    return res;
}

inline std::vector<float> logits(entmtp_heads *               h,
                                 int32_t                      head,
                                 const std::vector<float> &   hidden,
                                 const std::vector<int32_t> & path = { 5, 6, 7, 8 }) {
    entmtp_heads_info info;
    entmtp_heads_get_info(h, &info);
    std::vector<float> res(info.n_vocab_draft, NAN);
    CHECK_EQ(entmtp_heads_logits(h, head, hidden.data(), path.data(), res.data()), ENTMTP_OK);
    return res;
}

inline double max_diff(const std::vector<float> & a, const std::vector<float> & b) {
    double res = a.size() == b.size() ? 0.0 : 1e9;
    for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
        res = std::max(res, std::fabs((double) a[i] - (double) b[i]));
    }
    return res;
}

inline bool set_up() {
    tiny::be_quiet();
    base = tiny::load_base(tiny::write_base(dir / "base.gguf"));
    return CHECK(base);
}

inline int tear_down(const char * name) {
    base.reset();
    llama_backend_free();
    return check_result(name);
}
