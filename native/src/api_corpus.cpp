// The C boundary of texts to draft from.

#include "api.h"

#include "entmtp_corpus.h"

#include <algorithm>
#include <stdexcept>
#include <string>

struct entmtp_corpus {
    entmtp::text_index impl;
    int32_t            largest = entmtp::text_index::unknown; // token
};

using entmtp::fail;
using entmtp::guarded;
using entmtp::text_index;

entmtp_corpus * entmtp_corpus_init(const int32_t * tokens, int64_t n) {
    entmtp_corpus * res = nullptr;
    guarded([&] {
        if (n < 0 || n >= text_index::far || (n > 0 && !tokens)) {
            return fail("a corpus has 0 to 2^30 tokens");
        }
        auto corpus = std::make_unique<entmtp_corpus>();
        for (int64_t i = 0; i < n; ++i) {
            const int32_t token = std::max(tokens[i], (int32_t) text_index::unknown);
            corpus->impl.append(token);
            corpus->largest = std::max(corpus->largest, token);
        }
        res = corpus.release();
        return (int32_t) ENTMTP_OK;
    });
    return res;
}

void entmtp_corpus_free(entmtp_corpus * corpus) {
    delete corpus;
}

int32_t entmtp_decoder_set_corpus(entmtp_decoder * dec, const entmtp_corpus * corpus) {
    return guarded(dec, [&](entmtp::decoder & d) {
        if (corpus && corpus->largest >= d.size_of_vocabulary()) {
            throw std::runtime_error("token " + std::to_string(corpus->largest) +
                                     " of the corpus is not in the vocabulary of " +
                                     std::to_string(d.size_of_vocabulary()));
        }
        d.look_in(corpus ? &corpus->impl : nullptr);
        return (int32_t) ENTMTP_OK;
    });
}
