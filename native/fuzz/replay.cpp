// Runs a fuzzer over the files of folders: what libFuzzer does with a corpus, without libFuzzer.

#include "fuzz.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t *, size_t size, size_t) {
    return size;
}

int main(int argc, char ** argv) {
    size_t n = 0;
    for (int i = 1; i < argc; ++i) {
        std::vector<std::filesystem::path> files;
        for (const auto & entry : std::filesystem::directory_iterator(argv[i])) {
            files.push_back(entry.path());
        }
        std::sort(files.begin(), files.end());
        for (const auto & path : files) {
            std::ifstream           in(path, std::ios::binary);
            const std::vector<char> bytes{ std::istreambuf_iterator<char>(in), {} };
            fprintf(stderr, "%s\n", path.filename().string().c_str()); // the last one is the culprit
            LLVMFuzzerTestOneInput((const uint8_t *) bytes.data(), bytes.size());
            ++n;
        }
    }
    printf("%zu inputs: ok\n", n);
    return n > 0 ? 0 : 1;
}
