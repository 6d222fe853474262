// The text itself as a drafter: what followed when its last tokens came before.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace entmtp {

// Tokens of the prompt and the answer, with chains of the places where each pair of tokens stands. Appending and taking
// back are O(1); 16 to 20 bytes a token.
class text_index {
  public:
    static constexpr int32_t unknown    = -1; // a token that is not known: matches nothing
    static constexpr int32_t max_match  = 64; // tokens of a suffix that are compared
    static constexpr int32_t max_places = 16; // places that are kept of a match
    static constexpr int32_t max_walk   = 64; // places that are looked at, the latest first

    // a place in the text after which the suffix may go on
    struct place {
        int32_t at;     // index of the token that followed
        int32_t length; // tokens before it that match, 2 .. max_match
    };

    int32_t size() const { return (int32_t) tokens.size(); }
    int32_t operator[](int32_t i) const { return tokens[i]; }
    int32_t back() const { return tokens.empty() ? unknown : tokens.back(); }

    void append(int32_t token);
    void truncate(int32_t n); // longer than the text: what is missing is unknown

    // places where the text, followed by a tail that is not in it, has been before: the longest matches, the latest of
    // equal ones first. They replace what is in `found`
    void match(const int32_t * tail, int32_t n_tail, std::vector<place> & found) const;

  private:
    size_t bucket(int32_t a, int32_t b) const;
    void   rehash();

    std::vector<int32_t> tokens;
    std::vector<int32_t> before; // [n] the place before in the chain of this place's pair; -1: none
    std::vector<int32_t> heads;  // [power of two] the latest place of a chain
};

} // namespace entmtp
