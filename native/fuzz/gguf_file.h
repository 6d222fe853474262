// A GGUF file in parts, for changing one of them and leaving the rest in order: counts, lengths and places are right again.

#pragma once

#include "fuzz.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct gguf_parts {
    struct key {
        std::string name;
        uint32_t    type = 0;
        std::string value; // as stored
    };

    struct tensor {
        std::string           name;
        std::vector<uint64_t> shape;
        uint32_t              type   = 0;
        uint64_t              offset = 0;
    };

    uint32_t            version = 3;
    std::vector<key>    keys;
    std::vector<tensor> tensors;
    std::string         data;

    // false: it has no such form
    bool read(const uint8_t * bytes, size_t size) {
        at  = bytes;
        end = bytes + size;
        ok  = size >= 24;
        take<uint32_t>();
        version                = take<uint32_t>();
        const uint64_t n       = take<uint64_t>();
        const uint64_t n_pairs = take<uint64_t>();
        for (uint64_t i = 0; ok && i < n_pairs; ++i) {
            key k;
            k.name                = text();
            k.type                = take<uint32_t>();
            const uint8_t * start = at;
            skip(k.type);
            k.value.assign((const char *) start, at - start);
            keys.push_back(k);
        }
        for (uint64_t i = 0; ok && i < n; ++i) {
            tensor t;
            t.name                = text();
            const uint32_t n_dims = take<uint32_t>();
            for (uint32_t d = 0; ok && d < n_dims; ++d) {
                t.shape.push_back(take<uint64_t>());
            }
            t.type   = take<uint32_t>();
            t.offset = take<uint64_t>();
            tensors.push_back(t);
        }
        const size_t padding = (32 - (size_t) (at - bytes) % 32) % 32;
        if (ok && padding <= (size_t) (end - at)) {
            data.assign((const char *) at + padding, end - at - padding);
        }
        return ok;
    }

    std::string write() const {
        std::string out = "GGUF";
        put(out, version);
        put(out, (uint64_t) tensors.size());
        put(out, (uint64_t) keys.size());
        for (const key & k : keys) {
            put_text(out, k.name);
            put(out, k.type);
            out += k.value;
        }
        for (const tensor & t : tensors) {
            put_text(out, t.name);
            put(out, (uint32_t) t.shape.size());
            for (const uint64_t n : t.shape) {
                put(out, n);
            }
            put(out, t.type);
            put(out, t.offset);
        }
        out.resize((out.size() + 31) / 32 * 32);
        return out + data;
    }

    // the tensors lie one after the other
    void lay_out() {
        uint64_t offset = 0;
        for (tensor & t : tensors) {
            t.offset = offset;
            if (t.type < GGML_TYPE_COUNT && !t.shape.empty() && ggml_blck_size((ggml_type) t.type) > 0) {
                uint64_t n =
                    t.shape[0] / (uint64_t) ggml_blck_size((ggml_type) t.type) * ggml_type_size((ggml_type) t.type);
                for (size_t d = 1; d < t.shape.size(); ++d) {
                    n *= t.shape[d];
                }
                offset += (n + 31) / 32 * 32;
            }
        }
    }

    template <typename T>
    static void put(std::string & out, T x) {
        out.append((const char *) &x, sizeof(x));
    }

    static void put_text(std::string & out, const std::string & s) {
        put(out, (uint64_t) s.size());
        out += s;
    }

  private:
    template <typename T>
    T take() {
        T x = 0;
        if (ok && (size_t) (end - at) >= sizeof(T)) {
            memcpy(&x, at, sizeof(T));
            at += sizeof(T);
        } else {
            ok = false;
        }
        return x;
    }

    std::string text() {
        const uint64_t n = take<uint64_t>();
        if (!ok || n > (uint64_t) (end - at)) {
            ok = false;
            return "";
        }
        at += n;
        return { (const char *) at - n, (size_t) n };
    }

    void skip(uint32_t type) {
        static const uint8_t widths[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
        if (type == 8) {
            text();
        } else if (type == 9) {
            const uint32_t item = take<uint32_t>();
            const uint64_t n    = take<uint64_t>();
            ok                  = ok && item != 9;
            for (uint64_t i = 0; ok && i < n; ++i) {
                skip(item);
            }
        } else if (type < 13 && ok && widths[type] <= end - at) {
            at += widths[type];
        } else {
            ok = false;
        }
    }

    const uint8_t * at  = nullptr;
    const uint8_t * end = nullptr;
    bool            ok  = false;
};

// libFuzzer's own change of a text
inline std::string changed(const std::string & s) {
    std::string res = s;
    res.resize(s.size() + 16);
    res.resize(LLVMFuzzerMutate((uint8_t *) &res[0], s.size(), res.size()));
    return res;
}

// one change of a list: an item less, one twice, one elsewhere, or one that is not what it was
template <typename T, typename F>
void change_one(std::vector<T> & items, std::mt19937 & rng, F && change) {
    if (items.empty()) {
        return;
    }
    const size_t i = rng() % items.size(), j = rng() % items.size();
    switch (rng() % 8) {
        case 0:
            items.erase(items.begin() + (ptrdiff_t) i);
            break;
        case 1:
            items.insert(items.begin() + (ptrdiff_t) j, T(items[i]));
            break;
        case 2:
            std::swap(items[i], items[j]);
            break;
        default:
            change(items[i]);
    }
}

inline size_t mutate_gguf(uint8_t * bytes, size_t size, size_t max_size, std::mt19937 & rng) {
    static const uint64_t numbers[] = { 0,          1,          2,          3,          4,    5,   7,       8,
                                        31,         32,         33,         39,         40,   41,  63,      64,
                                        65,         96,         128,        160,        255,  256, 1 << 20, 1 << 24,
                                        1ull << 31, 1ull << 32, 1ull << 61, 1ull << 63, ~0ull };
    const auto            number    = [&] {
        return numbers[rng() % (sizeof(numbers) / sizeof(numbers[0]))];
    };

    gguf_parts file;
    if (!file.read(bytes, size)) {
        const size_t n = LLVMFuzzerMutate(bytes, size, max_size);
        memcpy(bytes, "GGUF\3\0\0\0", std::min<size_t>(n, 8));
        return n;
    }

    const uint32_t what = rng() % 16;
    if (what < 7) {
        change_one(file.keys, rng, [&](gguf_parts::key & k) {
            static const uint32_t types[] = { 4, 6, 7, 8, 9, 10 };
            switch (rng() % 6) {
                case 0:
                    k.name = changed(k.name);
                    break;
                case 1:
                    k.type = types[rng() % 6];
                    break;
                case 2:
                    k.value = changed(k.value);
                    break;
                default: {
                    const uint64_t x = number();
                    memcpy(&k.value[0], &x, std::min(k.value.size(), sizeof(x)));
                }
            }
        });
    } else if (what < 13) {
        change_one(file.tensors, rng, [&](gguf_parts::tensor & t) {
            switch (rng() % 6) {
                case 0:
                    t.name = changed(t.name);
                    break;
                case 1:
                    t.type = rng() % 42;
                    break;
                case 2:
                    t.offset = rng() % 2 ? number() : t.offset + 32;
                    break;
                case 3:
                    t.name = file.tensors[rng() % file.tensors.size()].name;
                    break;
                default:
                    if (t.shape.empty() || rng() % 8 == 0) {
                        t.shape.push_back(1);
                    }
                    t.shape[rng() % t.shape.size()] = number();
            }
        });
        if (rng() % 4) {
            file.lay_out();
        }
    } else if (what == 13) {
        file.version = (uint32_t) number();
    } else {
        file.data = changed(file.data);
    }

    const std::string res = file.write();
    if (res.size() > max_size) {
        return size;
    }
    memcpy(bytes, res.data(), res.size());
    return res.size();
}
