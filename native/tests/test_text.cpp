// Places in a text where its last tokens came before: against a search by brute force, and after every truncation.

#include "text.h"

#include "check.h"

#include <algorithm>
#include <random>
#include <vector>

using entmtp::text_index;

// all places by comparing everything with everything: the longest first, the latest of equal ones first
static std::vector<text_index::place> by_hand(const std::vector<int32_t> & text, const std::vector<int32_t> & tail) {
    std::vector<int32_t> all = text;
    all.insert(all.end(), tail.begin(), tail.end());
    const int32_t n = (int32_t) all.size();

    std::vector<text_index::place> found;
    for (int32_t at = (int32_t) text.size() - 1; at >= 1; --at) {
        int32_t length = 0;
        while (length < text_index::max_match && at - 1 - length >= 0 && text[at - 1 - length] >= 0 &&
               text[at - 1 - length] == all[n - 1 - length]) {
            ++length;
        }
        if (length >= 2) {
            found.push_back({ at, length });
        }
    }
    std::stable_sort(found.begin(), found.end(), [](auto a, auto b) { return a.length > b.length; });
    return found;
}

static void check_same(const text_index & index, const std::vector<int32_t> & text, const std::vector<int32_t> & tail) {
    std::vector<text_index::place> found;
    index.match(tail.data(), (int32_t) tail.size(), found);
    std::vector<text_index::place> expected = by_hand(text, tail);
    if (expected.size() > text_index::max_places) {
        return; // the walk is bounded: only what fits is compared
    }
    CHECK_EQ(found.size(), expected.size());
    for (size_t i = 0; i < std::min(found.size(), expected.size()); ++i) {
        CHECK_EQ(found[i].at, expected[i].at);
        CHECK_EQ(found[i].length, expected[i].length);
    }
}

static void test_against_brute_force() {
    std::mt19937 rng(11);
    for (int32_t round = 0; round < 300; ++round) {
        const int32_t        n_vocab = 4 + (int32_t) (rng() % 40);
        text_index           index;
        std::vector<int32_t> text;
        for (int32_t step = 0; step < 120; ++step) {
            if (rng() % 12 == 0) {
                // back, and with luck beyond the end: what is missing is unknown
                const int32_t n = (int32_t) (rng() % (text.size() + 3));
                index.truncate(n);
                text.resize(n, text_index::unknown);
            } else {
                // now and then an old piece again
                const bool again = text.size() > 8 && rng() % 3 == 0;
                for (size_t from = again ? rng() % text.size() : 0, k = again ? 1 + rng() % 6 : 1; k > 0; --k, ++from) {
                    const int32_t token = again ? text[from % text.size()] : (int32_t) (rng() % n_vocab);
                    index.append(token);
                    text.push_back(token);
                }
            }
            CHECK_EQ(index.size(), (int32_t) text.size());
            check_same(index, text, {});
            check_same(index, text, { (int32_t) (rng() % n_vocab), (int32_t) (rng() % n_vocab) });
        }
    }
}

// places in other texts come after those in the text itself that are as long, and go on with what followed there
static void test_other_texts() {
    std::mt19937 rng(5);
    for (int32_t round = 0; round < 200; ++round) {
        const int32_t        n_vocab = 6 + (int32_t) (rng() % 30);
        text_index           others, index;
        std::vector<int32_t> far_text, text;
        for (int32_t i = 0; i < 60; ++i) {
            far_text.push_back(rng() % 15 == 0 ? text_index::unknown : (int32_t) (rng() % n_vocab));
            others.append(far_text.back());
        }
        index.look_in(&others);
        for (int32_t i = 0; i < 50; ++i) {
            const bool again = rng() % 2 == 0;
            text.push_back(again ? std::max(far_text[rng() % far_text.size()], 0) : (int32_t) (rng() % n_vocab));
            index.append(text.back());

            const std::vector<int32_t> tail = i % 3 ? std::vector<int32_t>{} : std::vector<int32_t>{ 1 };
            std::vector<int32_t>       end  = text;
            end.insert(end.end(), tail.begin(), tail.end());

            auto expected = by_hand(text, tail);
            for (int32_t at = (int32_t) far_text.size() - 1; at >= 1; --at) {
                int32_t length = 0;
                while (length < (int32_t) end.size() && at - 1 - length >= 0 && far_text[at - 1 - length] >= 0 &&
                       far_text[at - 1 - length] == end[end.size() - 1 - length]) {
                    ++length;
                }
                if (length >= 2) {
                    expected.push_back({ text_index::far + at, length });
                }
            }
            std::stable_sort(expected.begin(), expected.end(), [](auto a, auto b) { return a.length > b.length; });

            std::vector<text_index::place> found;
            index.match(tail.data(), (int32_t) tail.size(), found);
            if (expected.size() > text_index::max_places) {
                continue;
            }
            CHECK_EQ(found.size(), expected.size());
            for (size_t k = 0; k < std::min(found.size(), expected.size()); ++k) {
                CHECK_EQ(found[k].at, expected[k].at);
                CHECK_EQ(found[k].length, expected[k].length);
                CHECK(index.holds(found[k].at));
                const bool is_far = found[k].at >= text_index::far;
                CHECK_EQ(index[found[k].at], is_far ? far_text[found[k].at - text_index::far] : text[found[k].at]);
            }
        }
        CHECK(!index.holds(text_index::far + others.size()) && !index.holds(index.size()));
        index.look_in(nullptr);
        CHECK(!index.holds(text_index::far));
    }
}

static void test_a_long_text_is_walked_boundedly() {
    text_index index;
    for (int32_t i = 0; i < 200000; ++i) {
        index.append(7);
    }
    std::vector<text_index::place> found;
    index.match(nullptr, 0, found);
    CHECK_EQ((int32_t) found.size(), text_index::max_places);
    CHECK_EQ(found[0].length, text_index::max_match);
    CHECK_EQ(found[0].at, 199999); // the latest
    index.truncate(3);
    index.match(nullptr, 0, found);
    CHECK_EQ((int32_t) found.size(), 1);
    CHECK_EQ(found[0].at, 2);
}

int main() {
    test_against_brute_force();
    test_other_texts();
    test_a_long_text_is_walked_boundedly();
    return check_result("test_text");
}
