// The text itself as a drafter: what followed when its last tokens came before, in it or in others.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace entmtp {

// Tokens of the prompt and the answer, with chains of the places where each pair of tokens stands. Appending and taking
// back are O(1); 16 to 20 bytes a token.
class text_index {
  public:
    static constexpr int32_t unknown    = -1;      // a token that is not known: matches nothing
    static constexpr int32_t max_match  = 64;      // tokens of a suffix that are compared
    static constexpr int32_t max_places = 16;      // places that are kept of a match
    static constexpr int32_t max_walk   = 64;      // places that are looked at in a text, the latest first
    static constexpr int32_t far        = 1 << 30; // places in other texts are those from here on

    // a place in the text after which the suffix may go on
    struct place {
        int32_t at;     // index of the token that followed; of other texts, far more
        int32_t length; // tokens before it that match, 2 .. max_match
    };

    int32_t size() const { return (int32_t) tokens.size(); }
    int32_t operator[](int32_t i) const { return i < far ? tokens[i] : others->tokens[i - far]; }
    int32_t back() const { return tokens.empty() ? unknown : tokens.back(); }

    // there is a token at a place
    bool holds(int32_t i) const { return i < far ? i < size() : others && i - far < others->size(); }

    // Other texts, one after the other with unknown tokens between them, where this one may be found, too. They are not
    // owned; null: none
    void look_in(const text_index * texts) { others = texts; }

    void append(int32_t token);
    void truncate(int32_t n); // longer than the text: what is missing is unknown

    // places where the text, followed by a tail that is not in it, has been before: the longest matches, of equal ones those
    // in the text itself and the latest first. They replace what is in `found`
    void match(const int32_t * tail, int32_t n_tail, std::vector<place> & found) const;

  private:
    // the suffix of a text that ends with a pair of tokens; at(i) is its token i places before the end
    template <typename F>
    void walk(int32_t first, int32_t last, int32_t n, F && at, int32_t offset, std::vector<place> & found) const;

    size_t bucket(int32_t a, int32_t b) const;
    void   rehash();

    const text_index * others = nullptr;

    std::vector<int32_t> tokens;
    std::vector<int32_t> before; // [n] the place before in the chain of this place's pair; -1: none
    std::vector<int32_t> heads;  // [power of two] the latest place of a chain
};

} // namespace entmtp
